from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.backends.reference import REFERENCE, accumulate
from llmkern.backends.reference.int8_linear import int8_linear
from llmkern.backends.reference.quantize_int8 import quantize_int8
from llmkern.backends.reference.quantized_linear import quantized_linear
from llmkern.dispatch import implements
from llmkern.ops._layer_held import Held, caches_of
from llmkern.ops._layer_packed import packed_behind
from llmkern.ops._layer_plan import layers_of
from llmkern.programs.program import Program
from llmkern.programs.run import run

_PACKED = ("codes", "scale", "zero", "offset", "super_scale", "super_offset", "code", "n")


@implements("layers_", REFERENCE)
def layers_(
    hidden: Tensor,
    programs: list[str],
    parameters: list[Tensor | None],
    inputs: list[Tensor | None],
    caches: list[Tensor],
    past: int,
    schemes: str,
) -> Tensor:
    each_scheme = schemes.split(";")
    layers = layers_of(programs, parameters).each
    held = caches_of([layer.program for layer in layers], caches)
    for i, (_, program, tensors) in enumerate(layers):
        weights = Tensors(program, tensors, each_scheme[i if len(each_scheme) > 1 else 0].split(","))
        cache = Buffers(held[i], past) if caches else None
        values = dict(zip(program.inputs, (hidden, *inputs), strict=True))
        hidden = run(program, values, weights, cache)
    return hidden.clone(memory_format=torch.contiguous_format)


class Tensors:
    """A layer's parameters in the order of `Program.parameters`, as `run` asks for them.

    schemes: of the int8 weights, one for all, or one for each linear layer.
    """

    def __init__(self, program: Program, tensors: Sequence[Tensor | None], schemes: Sequence[str]) -> None:
        rest: Iterator[Tensor | None] = iter(tensors)
        self._linears: dict[str, tuple[Any, ...]] = {}
        self._others: dict[str, tuple[Any, ...]] = {}
        for parameter in program.parameters():
            if parameter.kind == "linear":
                scheme = schemes[len(self._linears) if len(schemes) > 1 else 0]
                self._linears[parameter.path] = (next(rest), next(rest), next(rest), scheme)
            elif parameter.kind == "norm":
                self._others[parameter.path] = (next(rest), next(rest))
            else:
                self._others["@" + parameter.path] = (next(rest),)

    def linear(self, path: str, x: Tensor, call: Callable[..., Any]) -> Tensor:
        return self._linear(x, *self._linears[path])

    def expert(self, path: str, number: int, x: Tensor, call: Callable[..., Any]) -> Tensor:
        *tensors, scheme = self._linears[path]
        weight, scale, bias = [None if tensor is None else tensor[number] for tensor in tensors]
        return self._linear(x, weight, scale, bias, scheme)

    def _linear(self, x: Tensor, weight: Any, scale: Tensor | None, bias: Tensor | None, scheme: str) -> Tensor:
        if (packed := packed_behind(weight)) is not None:
            fields = {name: getattr(packed, name) for name in _PACKED}
            return quantized_linear(x, **fields, bias=bias, residual=None, activation="none", scheme="a8")
        if scale is not None:
            return int8_linear(x, weight, scale, bias, "none", scheme)
        xf = accumulate(x)
        return F.linear(xf, weight.to(xf.dtype), None if bias is None else bias.to(xf.dtype)).to(x.dtype)

    def norm(self, path: str) -> tuple[Tensor | None, Tensor | None]:
        weight, bias = self._others[path] if path in self._others else (*self._others["@" + path], None)
        return weight, bias

    def tensor(self, path: str) -> Tensor:
        tensor: Tensor = self._others["@" + path][0]
        return tensor


class Buffers:
    """A layer's keys and values in buffers that have room for more, and those of other tokens in their own."""

    def __init__(self, held: Held, past: int) -> None:
        self._held, self._past = held, past

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, [B, heads, tokens, D], the new ones last."""
        keys, values, *scales = self._held.appended
        k_scale, v_scale = scales or (None, None)
        return self._append(keys, k_scale, k), self._append(values, v_scale, v)

    def keep(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values of an encoder's tokens to their buffers, and return them."""
        for buffer, new in zip(self._held.kept, (k, v), strict=True):
            buffer.copy_(new)
        return k, v

    def kept(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values that an earlier call has written."""
        keys, values = self._held.kept
        return keys, values

    def _append(self, cache: Tensor, scale: Tensor | None, new: Tensor) -> Tensor:
        past, end = self._past, self._past + new.shape[2]
        if scale is None:
            cache[:, :, past:end] = new
            return cache[:, :, :end]
        cache[:, :, past:end], new_scale = quantize_int8(new)
        scale[:, :, past:end] = new_scale.squeeze(-1)
        if past == 0:
            return new
        dtype = torch.float64 if new.dtype == torch.float64 else torch.float32
        return (cache[:, :, :end] * scale[:, :, :end, None].to(dtype)).to(new.dtype)
