"""Parts of a layer while its program is read: each records that it was called, and computes a stand-in result
(weights: llmkern/swap/stand_ins.py)."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.integrations.transformers.attention import HARMLESS, INTERFACE
from llmkern.nn._int8_weight import HOOKS
from llmkern.programs.program import Place, Program, Step
from llmkern.programs.run import ACTIVATION_FUNCTIONS, attend, run
from llmkern.swap.derive import as_before, mentioned_globals, rebind
from llmkern.swap.guard import UNSEEN, Part, below, noted
from llmkern.swap.match import PROBE_SCALE, agrees, probe, stand_in, why_elsewhere
from llmkern.swap.observe import aside
from llmkern.swap.packed_experts import Experts, experts_of
from llmkern.swap.record import Recorder
from llmkern.swap.routers import Router, router_of
from llmkern.swap.rules import experts as experts_rule
from llmkern.swap.stand_ins import StandIns, is_linear, norm_of
from llmkern.swap.track import Refused
from llmkern.swap.whole_layer import MAKES_BIAS

__all__ = ["attentions", "copied"]

_MOST_ELEMENTS = 1 << 16  # of a parameter that a forward uses itself; larger ones are multiplied, or looked up


def activation_of(module: nn.Module) -> tuple[str, tuple[Part, ...]] | None:
    """Return which of `ACTIVATIONS` a module without parameters computes, on small and large inputs, with its guarded
    attributes; None if it computes none.  Raises `Refused` if it may compute something else on other inputs.
    """
    if module._modules or module._parameters or module._buffers:
        return None
    near = torch.linspace(-6, 6, 1025)
    shell = stand_in(module)
    seen = [(x, probe(shell, x)) for x in (near, near * PROBE_SCALE)]
    if any(out is None for _, out in seen):
        return None
    for name, function in ACTIVATION_FUNCTIONS.items():
        if all(agrees(out, function(x)) for x, out in seen):
            parts = noted(shell)
            reason = UNSEEN if parts is None else why_elsewhere(shell, near)
            if reason or parts is None:
                raise Refused(reason)
            return name, parts
    return None


class _Part(nn.Module):
    """Module that calls a function, which is not recorded."""

    def __init__(self, function: Callable[..., Any], stands_for: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.function, self._stands_for = aside(function), [stands_for]
        self.weight = torch.empty(0, dtype=dtype)  # for forwards that ask for its dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stands_for[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def copied(module: nn.Module, recorder: Recorder, weights: StandIns, path: str = "") -> nn.Module:
    """Copy the layer in eval mode and without hooks; every part of the copy records its calls."""
    children = {}
    for name, child in module._modules.items():
        if child is None:
            continue
        below, child = f"{path}.{name}" if path else name, as_before(child)
        made = _part(child, below, recorder, weights)
        if made is None and experts_rule.find(child) is not None:
            raise Refused(f"{below} computes something else than packed experts do that are known")
        children[name] = copied(child, recorder, weights, below) if made is None else made
    parameters = {}
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.numel() <= _MOST_ELEMENTS:
            where = f"{path}.{name}" if path else name
            parameters[name] = tensor = weights.tensor(where)
            recorder.given(where, tensor, "parameter")
    made = stand_in(module, children, parameters)
    state = vars(made)
    for name, buffer in module._buffers.items():
        table = _table(buffer, recorder, path, name)
        if table is not None:  # taken at the call, as parameters are
            state["_buffers"] = {other: b for other, b in state["_buffers"].items() if other != name}
            state["_parameters"][name] = table
    for name in HOOKS:
        state[name] = type(state[name])()
    for name in ("forward", "_old_forward", "_hf_hook"):
        state.pop(name, None)
    forward: Any = type(module).forward
    if INTERFACE in mentioned_globals(forward):
        state["forward"] = types.MethodType(rebind(forward, INTERFACE, _Interface(recorder)), made)
    if hasattr(module, MAKES_BIAS):
        stand_in_class: Any = type(made)
        members = {MAKES_BIAS: _biasing(module, recorder, weights, path)}
        made.__class__ = type(stand_in_class.__name__, (stand_in_class,), members)
    return made


def _biasing(module: Any, recorder: Recorder, weights: StandIns, path: str) -> Callable[..., Tensor]:
    """Stand in for the method of a module that makes a bias of the scores from the distances between tokens.  The bias
    is an input of the program: whatever the method computes, it is called for it.
    """

    def make(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        bias = weights.randn(*getattr(module, MAKES_BIAS)(*args, **kwargs).shape)
        recorder.given("bias", bias, "bias")
        recorder.given_later["bias"] = bias
        recorder.made.append((path, args, kwargs, bias))
        return bias

    return aside(make)


def _table(buffer: Tensor | None, recorder: Recorder, path: str, name: str) -> Tensor | None:
    """Return a stand-in for a table of numbers in which rows may be looked up, or None for other buffers."""
    if buffer is None or buffer.dim() != 2 or not buffer.is_floating_point():
        return None
    table = torch.rand(buffer.shape, dtype=torch.float64).to(recorder.dtype)
    recorder.given(f"{path}.{name}", table, "lookup")
    return table


def _part(child: nn.Module, path: str, recorder: Recorder, weights: StandIns) -> nn.Module | None:
    """Return the stand-in for a part, or None for a child whose own forward runs."""
    if isinstance(child, nn.MultiheadAttention):
        return _Part(partial(_multihead, child, path, recorder, weights), child, weights.dtype)
    if is_linear(child):

        def linear(x: Tensor) -> Tensor:
            out = weights.linear(path, x)
            recorder.linear(path, x, out)
            return out

        return _Part(linear, child, weights.dtype)
    at = tuple(path.split("."))
    if (experts := weights.once(experts_of, path, child)) is not None:
        weights.parts += below(at, experts.parts)
        return _Part(partial(_mixed, experts, path, recorder, weights), child, weights.dtype)
    if child._modules:
        return None
    if (router := weights.once(router_of, path, child)) is not None:
        weights.parts += below(at, router.parts)
        return _Part(partial(_routed, router, path, recorder, weights), child, weights.dtype)
    found = weights.once(norm_of, path, child)
    if found is not None:

        def norm(x: Tensor) -> Tensor:
            step = Step(("y",), found.op, ("x",), (Place(path),)).with_options(eps=found.eps, offset=found.offset)
            out = run(Program(("x",), (step,), "y"), {"x": x}, weights)
            recorder.norm(found.op, path, x, out, found.eps, found.offset)
            return out

        weights.parts += below(at, found.parts)
        return _Part(norm, child, weights.dtype)
    known = weights.once(activation_of, path, child)
    if known is None:
        return None
    kind, parts = known
    weights.parts += below(at, parts)

    def activation(x: Tensor) -> Tensor:
        out = ACTIVATION_FUNCTIONS[kind](x)
        recorder.pointwise(kind, x, out)
        return out

    return _Part(activation, child, weights.dtype)


def _routed(router: Router, path: str, recorder: Recorder, weights: StandIns, x: Tensor) -> tuple[Tensor, ...]:
    """Stand in for a router: the weights and numbers of the experts of each token."""
    correction = None if router.correction is None else Place(f"{path}.{router.correction}", tensor=True)
    step = Step(("r",), "route", ("x",), (Place(path),)).with_options(**router.options, correction=correction)
    dense = run(Program(("x",), (step,), "r"), {"x": x}, weights).flatten(0, -2)
    index = dense.topk(int(step.option("top") or 0), -1).indices  # type: ignore[arg-type]
    count, of_weights, of_index = router.returned
    out = [dense] * count
    out[of_weights], out[of_index] = dense.gather(-1, index), index
    recorder.routed(step, x, dense.shape[-1], out[of_weights], index)
    return tuple(out)


def _mixed(
    experts: Experts, path: str, recorder: Recorder, weights: StandIns, x: Tensor, index: Tensor, each: Tensor
) -> Tensor:
    """Stand in for packed experts.  index, each: the numbers and weights of the experts of each token."""
    layout = experts.layout
    step = Step(("u",), "experts", ("x", "r"), tuple(layout.places(path, experts.interleaved)))
    step = step.with_options(**experts.options)
    dense = x.new_zeros(x.shape[0], layout.experts).scatter(-1, index, each.to(x.dtype))
    out = run(Program(("x", "r"), (step,), "u"), {"x": x, "r": dense}, weights)
    recorder.mixed(step, x, index, each, out)
    return out


def _multihead(
    layer: nn.MultiheadAttention,
    path: str,
    recorder: Recorder,
    weights: StandIns,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:
    """Stand in for torch.nn.MultiheadAttention: one packed projection, attention, and the output projection."""
    if layer.in_proj_weight is None or layer.bias_k is not None or layer.add_zero_attn or not layer.batch_first:
        raise recorder.refuse(f"{path} has projections apart, keys of its own, or batches in the second place")
    if key is not value or attn_mask is not None or is_causal:
        raise recorder.refuse(f"{path} is given values apart, or a mask of queries and keys")

    def projected(x: Tensor) -> Tensor:
        out = weights.linear(f"{path}.in_proj", x)
        recorder.linear(f"{path}.in_proj", x, out)
        return out

    size, dim = layer.embed_dim, layer.head_dim
    from_query = projected(query)
    from_key = from_query if key is query else projected(key)

    def headed(x: Tensor, i: int) -> Tensor:
        return recorder.moved(x, lambda t: t[..., i * size : (i + 1) * size].unflatten(-1, (-1, dim)).transpose(1, 2))

    q, k, v = [headed(x, i) for i, x in enumerate((from_query, from_key, from_key))]
    mask = None if key_padding_mask is None else recorder.moved(key_padding_mask, lambda t: t[:, None, None])
    out = attend(q, k, v, mask, scale=dim**-0.5)
    result = recorder.attention(q, k, v, mask, out, scale=dim**-0.5)
    rows = out.transpose(1, 2).flatten(2)
    recorder.values.hold(rows, result)
    given = weights.linear(f"{path}.out_proj", rows)
    recorder.linear(f"{path}.out_proj", rows, given)
    return given, None


class _Interface:
    """Stand-in for transformers' AttentionInterface: one function under every name."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def get_interface(self, *_: Any) -> Callable[..., Any]:
        return aside(self._attend)

    def __getitem__(self, _: str) -> Callable[..., Any]:
        return aside(self._attend)

    def _attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        unknown = sorted(n for n, a in others.items() if a is not None and n not in HARMLESS | {"output_attentions"})
        if unknown or others.get("output_attentions") or dropout:
            raise self.recorder.refuse(f"its attention asks for {', '.join(unknown) or 'dropout or weights'}")
        numbers = (scaling, sliding_window, softcap)
        if any(isinstance(number, Tensor) for number in numbers):
            raise self.recorder.refuse("its attention's scale, window or soft cap is a tensor")
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        self.recorder.causal.add(bool(causal))
        if position_bias is not None and self.recorder.is_zero(position_bias):
            position_bias = None
        options: dict[str, Any] = {"scale": q.shape[-1] ** -0.5 if scaling is None else scaling}
        options |= {"causal": bool(causal), "window": sliding_window, "softcap": softcap}
        options |= {"sinks": s_aux, "bias": position_bias}
        given = {name: value for name, value in options.items() if value is not None}
        out = attend(q, k, v, mask, **given)
        result = self.recorder.attention(q, k, v, mask, out, **given)
        by_token = out.transpose(1, 2)
        self.recorder.values.hold(by_token, result)
        return by_token, None


def attentions(module: nn.Module) -> Iterator[nn.Module]:
    """Return the modules whose forward looks up its attention function."""
    for child in module.modules():
        if INTERFACE in mentioned_globals(type(as_before(child)).forward):
            yield child
