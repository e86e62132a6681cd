from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.backends.torch import TORCH
from llmkern.backends.torch.int8_linear import DEQUANTIZE_AT_ONCE
from llmkern.backends.torch.quantize_int8 import quantize_int8
from llmkern.dispatch import implements
from llmkern.ops.int8_matmul import activate
from llmkern.ops.quantized_linear import ARGUMENTS, packed_of, straight_through
from llmkern.packed import BLOCK, PANEL


def _refuse(x: Tensor, n: int, **_: object) -> str | None:
    return "an empty product has nothing to dequantize" if x.shape[-1] == 0 or n == 0 else None


@implements(
    "quantized_linear", TORCH, dtypes=(torch.float32, torch.bfloat16, torch.float16), has_backward=True, refuse=_refuse
)
def quantized_linear(**call: Any) -> Tensor:
    leaves = (call["x"], call["bias"], call["residual"])
    if torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves):
        return _StraightThrough.apply(*(call[name] for name in ARGUMENTS))
    return _forward(call)


def _forward(call: dict[str, Any]) -> Tensor:
    x, packed = call["x"], packed_of(call)
    if call["scheme"] == "a8":
        codes, scale = quantize_int8(x.unflatten(-1, (x.shape[-1] // BLOCK, BLOCK)))
        rows = (codes * scale).flatten(-2)
    else:
        rows = x
    panels = packed.codes.shape[0]
    step = max(1, DEQUANTIZE_AT_ONCE // (PANEL * packed.k)) if x.device.type == "cpu" else panels
    y = torch.cat(
        [
            F.linear(rows, packed.panels(i, i + step).dequantized().to(rows.dtype)).float()
            for i in range(0, panels, step)
        ],
        -1,
    )
    if call["bias"] is not None:
        y = y + call["bias"]
    y = activate(y, call["activation"])
    return (y if call["residual"] is None else y + call["residual"]).to(x.dtype).contiguous()


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        call = dict(zip(ARGUMENTS, arguments, strict=True))
        tensors = [name for name, value in call.items() if isinstance(value, Tensor)]
        ctx.save_for_backward(*(call[name] for name in tensors))
        ctx.tensors, ctx.plain = tensors, {name: call[name] for name in ARGUMENTS if name not in tensors}
        return _forward(call)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        call = ctx.plain | dict(zip(ctx.tensors, ctx.saved_tensors, strict=True))
        gradients = dict(zip(("x", "bias", "residual"), straight_through(dy, call), strict=True))
        return tuple(gradients.get(name) for name in ARGUMENTS)
