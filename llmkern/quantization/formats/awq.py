"""AWQ's layout (version "gemm"): `qweight` int32 [columns, rows / 8], `qzeros` [groups, rows / 8] and `scales`.

scales: [groups, rows].  Read only; what is saved again is `pack_quantized`.
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
from llmkern.quantization.formats.packed_int32 import read_awq

__all__ = ["FORMAT"]


def _refuse(group: Mapping[str, Any]) -> str | None:
    if group.get("format") != "awq":
        return f"its format is {group.get('format')!r}, expected 'awq'"
    if group.get("bits") != 4:
        return f"its bits are {group.get('bits')!r}, expected 4"
    if str(group.get("version") or "gemm").lower() != "gemm":
        return f"its version is {group['version']!r}, expected 'gemm'"
    return None


def _empty(path: str, module: nn.Module, group: Mapping[str, Any]) -> nn.Module:
    n, k = weight_out_in(module, path).shape
    groups = k // group_size_of(path, k, group["group_size"])
    tensors = {
        "qweight": ((k, n // 8), torch.int32),
        "qzeros": ((groups, n // 8), torch.int32),
        "scales": ((groups, n), torch.float32),
    }

    def read(given: dict[str, Tensor]) -> tuple[PackedWeight, None]:
        given["scales"] = narrowest(given["scales"])
        return read_awq(given)[0], None

    return awaiting_linear(path, module, tensors, read, biased=path in group["biased"])


FORMAT = Format("awq", refuse=_refuse, empty=_empty)
