"""The gate of a SwiGLU feed-forward layer (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from llmkern.checks import check_floating, check_same_device, check_same_dtype, check_shape
from llmkern.dispatch import dispatch
from llmkern.library import define

__all__ = ["swiglu"]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` with silu(g) = g / (1 + exp(-g)), computed in fp32 and rounded once.

    gate, up: the same shape and dtype (fp32, bf16, fp16 or fp64), any strides, such as the halves of a packed
        projection: `swiglu(*gate_up.chunk(2, dim=-1))`.
    Returns a contiguous tensor of that shape and dtype.  Differentiable in both.
    Raises TypeError for other or different dtypes, ValueError for different shapes or devices.
    """
    return dispatch("swiglu", _check, gate=gate, up=up)


def check_gated(op: str, gate: Tensor, up: Tensor) -> None:
    """Check that gate is floating, and up has its dtype, shape and device."""
    check_floating(op, gate=gate, up=up)
    check_same_dtype(op, "gate", gate, up=up)
    check_shape(op, "up", up, gate.shape, "the shape of gate")
    check_same_device(op, "gate", gate, up=up)


_check = partial(check_gated, "swiglu")


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = ctx.saved_tensors
    return dispatch("swiglu_backward", dy=dy, gate=gate, up=up)


def _fake_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


define("swiglu(Tensor gate, Tensor up) -> Tensor", fake=_fake, backward=_backward, setup_context=_setup_context)
define("swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor dgate, Tensor dup)", fake=_fake_backward)
