"""Large linear layers on the CPU, output heads above all: with few rows the weight is read at the speed of memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmkern import ops
from llmkern.checks import PLAIN_TENSORS
from llmkern.dispatch import implementation
from llmkern.swap.derive import is_own, untouched
from llmkern.swap.guard import guarded
from llmkern.swap.match import Match

SWITCHES = ("linear",)
MIN_BYTES = 8 << 20
"""A smaller weight may still be in a cache when it is read again, and its product is over before it is worth a word."""


def find(module: nn.Module) -> Match | None:
    native = implementation("linear", "cpu")
    if type(module) is not nn.Linear or not is_own(nn.Linear, "forward") or native.backend.missing is not None:
        return None
    weight = module.weight
    large = type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.nbytes >= MIN_BYTES
    if not large or weight.dtype not in (native.dtypes or ()):
        return None
    return Match("linear", "linear", cls=guarded(nn.Linear, _forward, op="linear"), sample=_sample)


def _sample(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    return {
        "x": torch.zeros(1, 64, dtype=dtype, device=device),
        "weight": torch.zeros(64, 64, dtype=dtype, device=device),
        "bias": None,
        "activation": "none",
    }


def _forward(self: Any, input: Tensor) -> Tensor:
    weight, bias = self.weight, self.bias
    reason = ""
    if type(weight) not in PLAIN_TENSORS or (bias is not None and type(bias) not in PLAIN_TENSORS):
        reason = f"its weight is a {type(weight).__name__}"
    elif torch.is_autocast_enabled(input.device.type):
        reason = "autocast chooses the dtype"
    elif input.dtype is not weight.dtype:
        reason = f"the input is {input.dtype}, the weight {weight.dtype}"
    if reason:
        out: Tensor = untouched(self, "linear", reason, (input,), {})
        return out
    return ops.linear(input, weight, bias)
