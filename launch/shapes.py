"""Shapes of models that are measured without their weights."""

from selfdev_jax import models

SHAPES = {
    "mistral-7b": models.DecoderConfig(
        vocab_size=32_000,
        embed=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=14_336,
    ),
    # A. Karpathy's stories15M: to see in seconds what is printed.
    "stories-15m": models.DecoderConfig(
        vocab_size=32_000,
        embed=288,
        layers=6,
        heads=6,
        kv_heads=6,
        head_dim=48,
        mlp=768,
        tied_head=True,
    ),
}
