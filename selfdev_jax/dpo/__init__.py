"""Direct Preference Optimisation of an adapter or a whole model, in Optax.

R. Rafailov et al., Direct Preference Optimization, arXiv 2305.18290;
E. J. Hu et al., LoRA, arXiv 2106.09685.
"""
