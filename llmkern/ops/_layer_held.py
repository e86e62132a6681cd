"""Check the inputs and caches of a `layers_` call against what its layers need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern.checks import (
    broadcasts,
    check_dtype,
    check_floating,
    check_same_device,
    check_same_dtype,
    check_shape,
    shape_text,
)
from llmkern.ops._layer_sizes import Needs
from llmkern.programs.program import Program

__all__ = ["Held", "caches_of", "check_biases", "check_caches", "check_inputs"]

_OP = "layers_"
_CACHES = ("keys", "values")


class Held(NamedTuple):
    """Caches of one layer: keys, values and their scales, and the keys and values kept of an encoder's tokens."""

    appended: Sequence[Tensor] = ()
    kept: Sequence[Tensor] = ()


def check_inputs(needs: Needs, hidden: Tensor, inputs: Sequence[Tensor | None], past: int) -> None:
    """Check the shapes of angles and masks; other inputs were checked with the parameters."""
    batch, length, _ = hidden.shape
    angles = []
    for place, name, columns in needs.angles:
        tensor = inputs[place]
        if tensor is None:
            raise TypeError(f"{_OP}: {name} is None, expected a Tensor")
        check_floating(_OP, **{name: tensor})
        check_same_device(_OP, "hidden", hidden, **{name: tensor})
        if tensor.dim() != 3 or not broadcasts(tensor.shape[0], batch) or tensor.shape[1] != length:
            expected = f"[{batch} or 1, {length}, {columns}]"
            raise ValueError(f"{_OP}: {name} has shape {shape_text(tensor.shape)}, expected {expected}")
        if tensor.shape[2] not in (columns, columns // 2):
            raise ValueError(f"{_OP}: {name} has width {tensor.shape[2]}, expected {columns} or {columns // 2}")
        angles.append((name, tensor))
    for name, tensor in angles[1:]:
        check_same_dtype(_OP, angles[0][0], angles[0][1], **{name: tensor})
    for place, name, heads, of in needs.masks:
        mask = inputs[place]
        if mask is None:
            continue
        keys = length + past if isinstance(of, str) else of
        check_dtype(_OP, name, mask, *dict.fromkeys((torch.bool, hidden.dtype, torch.float32)))
        check_same_device(_OP, "hidden", hidden, **{name: mask})
        full = (batch, heads, length, keys)
        if mask.dim() != 4 or not all([broadcasts(*sizes) for sizes in zip(mask.shape, full, strict=True)]):
            raise ValueError(
                f"{_OP}: {name} has shape {shape_text(mask.shape)}, expected one of 4 dimensions that broadcasts to "
                f"{shape_text(full)} (batch, query heads, queries, keys)"
            )


def caches_of(programs: Sequence[Program], caches: Sequence[Tensor]) -> list[Held]:
    """Split the caches by layer; empty for a layer that neither appends nor keeps, or if none are given."""
    ops = [{step.op for step in program.steps} for program in programs]
    if not caches:
        return [Held()] * len(programs)
    appending, keeping = sum(["append" in each for each in ops]), sum(["keep" in each for each in ops])
    each = (len(caches) - 2 * keeping) // appending if appending else 0
    if len(caches) != each * appending + 2 * keeping or (appending and each not in (2, 4)):
        expected = f"expected none, or 2 or 4 for each of {appending} layers that append"
        expected += f", and 2 for each of {keeping} that keep" if keeping else ""
        raise ValueError(f"{_OP}: caches has {len(caches)} elements, {expected}")
    found, first = [], 0
    for own in ops:
        middle = first + each * ("append" in own)
        end = middle + 2 * ("keep" in own)
        found.append(Held(caches[first:middle], caches[middle:end]))
        first = end
    return found


def check_caches(needs: Sequence[Needs], hidden: Tensor, caches: Sequence[Held], past: int) -> None:
    """Check that each layer's caches fit the keys and values that are written to them."""
    right: tuple[Any, ...] = ()  # the layer before this one, which tends to be like it
    for i, (each, held) in enumerate(zip(needs, caches, strict=True)):
        like = (each, *[(t.shape, t.dtype, t.device) for t in (*held.appended, *held.kept)])
        if like != right:
            _check_cache(each, hidden, held.appended, past, f" of layer {i}")
            _check_kept(each, hidden, held.kept, f" of layer {i}")
            right = like


def _check_kept(needs: Needs, hidden: Tensor, tensors: Sequence[Tensor], where: str) -> None:
    if needs.kept is None:
        return
    *columns, tokens, heads = needs.kept
    for kind, cache, size in zip(_CACHES, tensors, columns, strict=False):
        name = f"kept {kind}{where}"
        check_dtype(_OP, name, cache, hidden.dtype)
        check_same_device(_OP, "hidden", hidden, **{name: cache})
        dim = size // max(heads, 1)
        shape = (hidden.shape[0], heads, tokens, dim)
        check_shape(_OP, name, cache, shape, "batch, heads, tokens and columns of a head")


def check_biases(needs: Needs, hidden: Tensor, inputs: Sequence[Tensor | None], past: int) -> None:
    """Check that biases of the scores have the shape and dtype that a layer needs."""
    batch, length, _ = hidden.shape
    for place, name, heads, of in needs.biases:
        bias = inputs[place]
        if bias is None:
            continue
        keys = length + past if isinstance(of, str) else of
        check_floating(_OP, **{name: bias})
        check_same_device(_OP, "hidden", hidden, **{name: bias})
        full = (batch, heads, length) if bias.dim() == 4 else (batch * heads, length)
        by_head = bias.dim() == 4 or bias.shape[:1] == (batch * heads,)
        broadcast = all([broadcasts(*sizes) for sizes in zip(bias.shape, full, strict=False)])
        if bias.dim() not in (3, 4) or not by_head or not broadcast or bias.shape[-1] < keys:
            raise ValueError(
                f"{_OP}: {name} has shape {shape_text(bias.shape)}, expected one that broadcasts to "
                f"{shape_text((batch, heads, length, keys))}, or [{batch * heads}, 1, {keys}], as many keys or more"
            )


def _check_cache(needs: Needs, hidden: Tensor, tensors: Sequence[Tensor], past: int, where: str) -> None:
    if needs.cache is None:
        return
    if not tensors:
        if past:
            raise ValueError(f"{_OP}: past is {past}, expected 0 where there are no caches")
        return
    batch, length, _ = hidden.shape
    for i, (kind, columns) in enumerate(zip(_CACHES, needs.cache, strict=False)):
        cache, name = tensors[i], f"{kind}{where}"
        scale = tensors[2 + i] if len(tensors) > 2 else None
        heads = needs.cache[2] or (cache.shape[1] if cache.dim() == 4 else 1)
        check_dtype(_OP, name, cache, hidden.dtype if scale is None else torch.int8)
        check_same_device(_OP, "hidden", hidden, **{name: cache, f"the scales of the {name}": scale})
        if cache.dim() != 4 or tuple(cache.shape[:2]) != (batch, heads) or heads * cache.shape[3] != columns:
            expected = f"[{batch}, {heads}, capacity, {columns // max(heads, 1)}]"
            raise ValueError(f"{_OP}: {name} has shape {shape_text(cache.shape)}, expected {expected}")
        if cache.shape[2] < past + length:
            expected = f"expected at least {past + length} (past and hidden's length)"
            raise ValueError(f"{_OP}: {name} has room for {cache.shape[2]} tokens, {expected}")
        if scale is not None:
            check_dtype(_OP, f"the scales of the {name}", scale, torch.float32)
            shape = cache.shape[:3]
            check_shape(_OP, f"the scales of the {name}", scale, shape, f"that of {name} without its last dimension")
