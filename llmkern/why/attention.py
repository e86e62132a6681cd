from __future__ import annotations

from typing import Any

import torch


def build(
    make: Any,
    B: int,
    Hq: int,
    Hkv: int,
    Sq: int,
    Skv: int,
    D: int,
    *,
    mask: str = "none",
    padding: bool = False,
    sinks: bool = False,
) -> dict[str, Any]:
    """mask: none, bool or additive, of full size; padding: a key padding mask."""
    arguments = {"q": make.randn(B, Hq, Sq, D), "k": make.randn(B, Hkv, Skv, D), "v": make.randn(B, Hkv, Skv, D)}
    if mask not in ("none", "bool", "additive"):
        raise ValueError(f"why: mask is {mask!r}, expected none, bool or additive")
    if mask == "bool":
        arguments["attn_mask"] = make.randint(0, 2, B, 1, Sq, Skv, dtype=torch.bool)
    if mask == "additive":
        arguments["attn_mask"] = make.randn(B, 1, Sq, Skv)
    if padding:
        arguments["key_padding_mask"] = make.randint(0, 2, B, Skv, dtype=torch.bool)
    if sinks:
        arguments["sinks"] = make.randn(Hq)
    return arguments
