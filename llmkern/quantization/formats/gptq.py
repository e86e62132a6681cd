"""GPTQ's layout: `qweight` int32 [columns · bits / 32, rows], `qzeros`, `scales` [groups, rows], `g_idx` [columns].

Read only; what is saved again is `pack_quantized`.  Zero points are stored less 1 by version 1 of the format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.nn.quantized_linear import weight_out_in
from llmkern.packed import PackedWeight
from llmkern.quantization.formats import Format
from llmkern.quantization.formats._awaiting import awaiting_linear, group_size_of, narrowest
from llmkern.quantization.formats.packed_int32 import read_gptq

__all__ = ["FORMAT"]

VERSIONS = {"gptq": 1, "gptq_v2": 2}


def _refuse(group: Mapping[str, Any]) -> str | None:
    if group.get("format") != "gptq":
        return f"its format is {group.get('format')!r}, expected 'gptq'"
    if group.get("bits") not in (4, 8):
        return f"its bits are {group.get('bits')!r}, expected 4 or 8"
    if group.get("checkpoint_format") not in (None, *VERSIONS):
        return f"its checkpoint_format is {group['checkpoint_format']!r}, expected {' or '.join(map(repr, VERSIONS))}"
    return None


def _empty(path: str, module: nn.Module, group: Mapping[str, Any]) -> nn.Module:
    bits, version = group["bits"], VERSIONS[group.get("checkpoint_format") or "gptq"]
    n, k = weight_out_in(module, path).shape
    groups = k // group_size_of(path, k, group["group_size"])
    tensors = {
        "qweight": ((k * bits // 32, n), torch.int32),
        "qzeros": ((groups, n * bits // 32), torch.int32),
        "scales": ((groups, n), torch.float32),
        **({"g_idx": ((k,), torch.int32)} if path in group["ordered"] else {}),
    }

    def read(given: dict[str, Tensor]) -> tuple[PackedWeight, Tensor | None]:
        given["scales"] = narrowest(given["scales"])
        packed, permutation = read_gptq(given, bits, version=version)
        if group.get("sym") and packed.zero is not None:
            found = sorted({int(zero) for zero in (packed.zero.min(), packed.zero.max())})
            raise ValueError(
                f"its qzeros stand for {' to '.join(map(str, found))}, expected {1 << bits - 1} of symmetric codes: of "
                f"the other version than checkpoint_format {group.get('checkpoint_format') or 'gptq'!r} says?"
            )
        return packed, permutation

    return awaiting_linear(path, module, tensors, read, biased=path in group["biased"])


FORMAT = Format("gptq", refuse=_refuse, empty=_empty)
