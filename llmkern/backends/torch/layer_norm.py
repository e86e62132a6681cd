from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.backends.torch import TORCH
from llmkern.dispatch import implements


def _one_dtype(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    return all([parameter is None or parameter.dtype == x.dtype for parameter in (weight, bias)])


@implements("layer_norm", TORCH, has_backward=True)
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if _one_dtype(x, weight, bias):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps).contiguous()
    # PyTorch takes parameters of another dtype on some devices only; fp32 holds every half-precision one.
    wide = x.dtype if x.dtype.itemsize >= 4 else torch.float32
    weight, bias = (None if parameter is None else parameter.to(wide) for parameter in (weight, bias))
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps).to(x.dtype).contiguous()


def _refuse_backward(x: Tensor, weight: Tensor | None, bias: Tensor | None, **_: object) -> str | None:
    return None if _one_dtype(x, weight, bias) else "PyTorch's backward takes parameters of x's dtype only"


@implements("layer_norm_backward", TORCH, refuse=_refuse_backward)
def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    aten, hidden = torch.ops.aten, x.shape[-1:]
    _, mean, rstd = aten.native_layer_norm(x, hidden, weight, bias, eps)
    wanted = [True, weight is not None, bias is not None]
    dx, dweight, dbias = aten.native_layer_norm_backward(dy, x, hidden, mean, rstd, weight, bias, wanted)
    dweight, dbias = (x.new_empty(0) if gradient is None else gradient for gradient in (dweight, dbias))
    return dx.contiguous(), dweight, dbias
