"""Run a model's layers one after the other in one call; each is described by a program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern.dispatch import Refused, dispatch
from llmkern.library import define
from llmkern.ops._layer import check_hidden, resolve_schemes
from llmkern.ops._layer_held import Held, caches_of, check_biases, check_caches, check_inputs
from llmkern.ops._layer_plan import Layers, layers_of, plan_of, texts_of
from llmkern.ops._layer_sizes import Needs, needs_of, rows_inputs
from llmkern.ops.int8_linear import SCHEMES
from llmkern.programs.program import Program

__all__ = ["layers_"]

_OP = "layers_"


def layers_(
    hidden: Tensor,
    programs: str | Program | Sequence[str | Program],
    parameters: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None] = (),
    caches: Sequence[Tensor] = (),
    past: int = 0,
    schemes: str = "auto",
) -> Tensor:
    """Run `hidden` through the layers in order, each as its program says.

    hidden: [B, S, H], fp32, bf16, fp16 or fp64; the first input of each program.
    programs: one for all layers, or one for each; llmkern/programs/program.py has their form and meaning.
    parameters: of each layer what its program mentions, in the order of the first mention (`Program.parameters`): of a
        linear layer weight [N, K] in hidden's dtype, or int8 with a scale, fp32 [N, 1], as for `int8_linear`, scale and
        bias [N], of experts the same with a dimension of experts before the others; of a norm weight and bias; or one
        tensor.  None where there is none.  A packed weight is what `handle_of` (llmkern/ops/_layer_packed.py) makes of
        it, and reads x as `quantized_linear` does under "a8".  Or a single tensor that `plan_layers`
        (llmkern/ops/_layer_plan.py) made; `programs` is then empty, or those that it was made with.
    inputs: what the programs' heads name behind hidden, one for all layers, None for an absent one.  cos, sin:
        [B or 1, S, W]; masks: 4 dimensions that broadcast to [B, heads, S, keys], bool (True: attend), or hidden's
        dtype or fp32 (added); biases of scores: the same, floating, with that many keys or more, or [B*heads, 1, keys];
        others: rows [B, tokens, columns], None where a cache has kept the keys and values made of them.
    caches: none, or of each layer that appends keys [B, heads, capacity, D] and values, **written**: the new tokens'
        are put at positions past … past + S − 1; the positions before are read, those after never.  In hidden's dtype;
        or int8, and of each layer the scales of keys and of values besides, fp32 [B, heads, capacity]: each head of
        each token is rounded as `quantize_int8` does.  The attention sees the rounded values, but where there is no
        past the tokens as they are.  Behind them, of a layer that keeps an encoder's, keys and values [B, heads,
        tokens, D] in hidden's dtype: **written** where the encoder's tokens are given, and read where they are not.
    past: tokens in the caches.
    schemes: of the int8 weights, as for `int8_linear`: one for all, or of each linear layer in the order of its first
        mention, with commas; of all layers, or of each, with semicolons.
    Returns [B, S, H], contiguous, in hidden's dtype.  Sums and norms are in fp32 (fp64 for fp64); between steps values
    are rounded to hidden's dtype, or not at all.  A sequence's bits depend on the sequences beside it as a row's do in
    `linear` and `int8_linear`.
    No gradient.  Raises TypeError for other dtypes, ValueError for other programs, shapes, devices or values.
    """
    return dispatch(
        _OP,
        _check,
        hidden=hidden,
        programs=texts_of(programs),
        parameters=list(parameters),
        inputs=list(inputs),
        caches=list(caches),
        past=past,
        schemes=";".join([resolve_schemes(each, hidden) for each in schemes.split(";")]),
    )


def _check(
    hidden: Tensor,
    programs: list[str],
    parameters: list[Tensor | None],
    inputs: list[Tensor | None],
    caches: list[Tensor],
    past: int,
    schemes: str,
) -> None:
    check_hidden(_OP, hidden)
    for name, tensors in (("parameters", parameters), ("inputs", inputs), ("caches", caches)):
        if not all([isinstance(tensor, Tensor) or (tensor is None and name != "caches") for tensor in tensors]):
            raise TypeError(f"{_OP}: {name} has an element that is no Tensor")
    if past < 0:
        raise ValueError(f"{_OP}: past is {past}, expected a number of tokens, 0 or more")
    layers = layers_of(programs, parameters)
    held = caches_of([layer.program for layer in layers.each], caches)
    needs = _needs(layers, hidden, parameters, inputs, held)
    _check_schemes(schemes, [needs[kind] for kind in layers.kinds] if ";" in schemes else needs)
    for each in needs:
        check_inputs(each, hidden, inputs, past if caches else 0)
        check_biases(each, hidden, inputs, past if caches else 0)
    check_caches([needs[kind] for kind in layers.kinds], hidden, held, past)


def _needs(
    layers: Layers,
    hidden: Tensor,
    parameters: list[Tensor | None],
    inputs: list[Tensor | None],
    held: list[Held],
) -> tuple[Needs, ...]:
    """Return the requirements of each kind of layer on inputs and caches; its parameters are already checked."""
    plan = plan_of(parameters)
    if plan is None:
        return _needs_of(layers, hidden, inputs, held)
    if torch.is_grad_enabled() and any([p is not None and p.requires_grad for p in plan.parameters]):
        raise Refused(f"{_OP} has no gradient: detach its inputs or call it under torch.no_grad()")
    shapes = tuple([t.shape for t in rows_inputs(layers.different[0].program, inputs)])
    shapes += tuple([t.shape for each in held[:1] for t in each.kept])
    key = (hidden.shape, hidden.dtype, hidden.device, len(inputs), shapes)
    if key not in plan.needs:
        if len(plan.needs) >= 64:  # prompts of any length
            plan.needs.clear()
        plan.needs[key] = _needs_of(layers, hidden, inputs, held)
    return plan.needs[key]


def _needs_of(layers: Layers, hidden: Tensor, inputs: list[Tensor | None], held: list[Held]) -> tuple[Needs, ...]:
    found = []
    for kind, layer in enumerate(layers.different):
        first = layers.kinds.index(kind)
        number = first if len(layers.each) > 1 else None
        found.append(needs_of(layer.program, layer.tensors, hidden, inputs, held[first].kept, number))
    return tuple(found)


def _check_schemes(schemes: str, needs: Sequence[Needs]) -> None:
    """Check that `schemes` is one of int8_linear's, or one per linear layer, of all layers or of each."""
    layers = schemes.split(";")
    if len(layers) > 1 and len(layers) != len(needs):
        raise ValueError(f"{_OP}: schemes is for {len(layers)} layers, expected 1 or {len(needs)}")
    for part, each in zip(layers if len(layers) > 1 else layers * len(needs), needs, strict=True):
        parts = part.split(",")
        if wrong := [scheme for scheme in parts if scheme not in SCHEMES]:
            raise ValueError(f"{_OP}: schemes has {wrong[0]!r}, expected {' or '.join(map(repr, SCHEMES))}")
        if len(parts) not in (1, each.linears):
            raise ValueError(
                f"{_OP}: schemes has {len(parts)} parts, expected 1 or {each.linears}, one for each linear layer"
            )


def _fake(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden.new_empty(hidden.shape)


def _texts(programs: list[str], parameters: list[Tensor | None], **_: Any) -> str:
    return "\n".join(dict.fromkeys([layer.text for layer in layers_of(programs, parameters).each]))


define(
    "layers_(Tensor hidden, str[] programs, Tensor?[] parameters, Tensor?[] inputs, Tensor(a!)[] caches, SymInt past,"
    " str schemes) -> Tensor",
    fake=_fake,
    about=_texts,
)
