from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._layer import MAX_HEAD_DIM
from llmkern.backends.cpu._rows import DTYPES
from llmkern.dispatch import implements
from llmkern.library import native
from llmkern.ops._layer_packed import packed_behind, unserved
from llmkern.ops._layer_plan import Layer, layers_of
from llmkern.ops._layer_sizes import rows_inputs
from llmkern.programs.program import Place, parse


def _refuse(
    hidden: Tensor,
    programs: list[str],
    parameters: list[Tensor | None],
    inputs: list[Tensor | None],
    caches: list[Tensor],
    **_: Any,
) -> str | None:
    layers = layers_of(programs, parameters)
    for layer in layers.different:
        reason = _refuse_program(layer.text) or _refuse_parameters(layer, hidden.dtype)
        if reason is not None:
            return reason
    program = layers.different[0].program
    for name, tensor in zip(program.inputs[1:], inputs, strict=True):
        if tensor is not None and tensor.dtype not in (torch.bool, *DTYPES):
            return f"{name} is {tensor.dtype}; bool, float32, bfloat16 and float16 are taken"
        if tensor is not None and tensor.dim() == 3 and _strided(tensor):
            return f"the last dimension of {name} has stride {tensor.stride(-1)}; only 1 is taken"
    if not all([tensor.is_contiguous() for tensor in rows_inputs(program, inputs)]):
        return "an input of rows is not contiguous"
    for cache in caches:
        if cache.dim() == 4 and _strided(cache):
            return f"the vectors of a cache have stride {cache.stride(-1)}; only 1 is taken"
    return None


def _strided(tensor: Tensor) -> bool:
    return tensor.stride(-1) != 1 and tensor.shape[-1] > 1


@lru_cache(maxsize=512)
def _refuse_program(text: str) -> str | None:
    """Return why the steps of a program are refused, or None."""
    for step in parse(text).steps:
        if step.op == "attention" and int(step.option("dim") or 0) > MAX_HEAD_DIM:  # type: ignore[arg-type]
            return f"dim is {step.option('dim')}; at most {MAX_HEAD_DIM} is taken"
    return None


@lru_cache(maxsize=512)
def _factors(text: str) -> frozenset[str]:
    """Paths of the tensors that columns are multiplied by."""
    factors = [step.option("by") for step in parse(text).steps]
    return frozenset([by.path for by in factors if isinstance(by, Place)])


_PARTS = {"linear": ("weight", "scale", "bias"), "norm": ("weight", "bias"), "tensor": ("it",)}


def _refuse_parameters(layer: Layer, dtype: torch.dtype) -> str | None:
    rest = iter(layer.tensors)
    factors = _factors(layer.text)
    for parameter in layer.program.parameters():
        for part in _PARTS[parameter.kind]:
            tensor, name = next(rest), f"{parameter.path}: {part}"
            if tensor is None:
                continue
            if (packed := packed_behind(tensor)) is not None:
                if (reason := unserved(packed)) is not None:
                    return f"{name}: its {reason}; float32, bfloat16, float16, int8 and uint8 are taken"
                continue
            matrix = parameter.kind == "linear" and part == "weight"
            if matrix and _strided(tensor) and (tensor.dtype == torch.int8 or _strided(tensor.mT)):
                return f"{name} has strides {tensor.stride()}; one of them has to be 1, of int8 the last"
            if parameter.kind == "tensor" and parameter.path in factors and tensor.dtype != dtype:
                return f"@{parameter.path} is {tensor.dtype}; only hidden's {dtype} is taken"
            if not matrix and not tensor.is_contiguous():
                return f"{name} is not contiguous"
            if parameter.kind == "linear" and part == "bias" and tensor.dtype != dtype:
                return f"{name} is {tensor.dtype}; only hidden's {dtype} is taken"
            if parameter.kind != "linear" and tensor.dtype not in DTYPES:
                return f"{name} is {tensor.dtype}; float32, bfloat16 and float16 are taken"
    return None


implements("layers_", CPU, dtypes=DTYPES, refuse=_refuse, rows_alone="on request")(native("layers_"))
