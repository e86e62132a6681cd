"""Sweeps of matrix products: the linear layers of published models, from one row to 8192."""

from __future__ import annotations

import torch

from llmkern.bench.sweep import Sweep

__all__ = ["linear_sweeps"]

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
LAYERS = {
    "Llama-3-8B": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "Qwen2.5-7B": {"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)},
    "SmolLM2-135M": {"qkv": (960, 576), "o": (576, 576), "gate": (1536, 576), "down": (576, 1536)},
    "BERT-base": {"qkv": (2304, 768), "o": (768, 768), "up": (3072, 768), "down": (768, 3072)},
}
"""[out, in] of the weights."""
QUICK = {("SmolLM2-135M", "gate"): (1, 512), ("Llama-3-8B", "o"): (1, 64)}


def linear_sweeps() -> tuple[Sweep, ...]:
    return tuple(
        Sweep(
            f"{model} {layer}",
            ("M",),
            ROWS,
            {"N": n, "K": k},
            dtypes={"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)},
            quick=QUICK.get((model, layer), ()),
            check={"M": 64, "N": 512},
        )
        for model, layers in LAYERS.items()
        for layer, (n, k) in layers.items()
    )
