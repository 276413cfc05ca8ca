"""Shapes of the seed models in configs/, for where the hub is out of reach.

As their config.json files on the Hugging Face hub have them; what no estimate
needs (RoPE, windows, eps) is left out. Once a config.json can be read, it is
what counts.
"""

from selfdev_jax import models

SHAPES = {
    "openchat/openchat-3.5-1210": models.DecoderConfig(
        vocab_size=32_002,
        embed=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=14_336,
        max_positions=8192,
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": models.DecoderConfig(
        family="qwen2",
        vocab_size=151_936,
        embed=896,
        layers=24,
        heads=14,
        kv_heads=2,
        head_dim=64,
        mlp=4864,
        qkv_bias=True,
        tied_head=True,
        max_positions=32_768,
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": models.DecoderConfig(
        family="qwen2",
        vocab_size=151_936,
        embed=1536,
        layers=28,
        heads=12,
        kv_heads=2,
        head_dim=128,
        mlp=8960,
        qkv_bias=True,
        tied_head=True,
        max_positions=32_768,
    ),
    "Qwen/Qwen3-4B-Instruct-2507": models.DecoderConfig(
        family="qwen3",
        vocab_size=151_936,
        embed=2560,
        layers=36,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=9728,
        qk_norm=True,
        tied_head=True,
        max_positions=262_144,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": models.DecoderConfig(
        family="llama",
        vocab_size=128_256,
        embed=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=14_336,
        max_positions=131_072,
    ),
}
