"""Layers of decoders and encoders as one op: what a layer computes is read off its own forward, as a program.

A layer holds one or two attentions and at least two more linear layers; what is in it, and how its parts are put
together, is found by running copies of it (llmkern/swap/layer_program.py).  The executor's own check says whether it
can run the program.  At each call the op serves what it can; the rest goes through the layer's own forward, whose parts
are swapped one by one as well, with the reason on record (llmkern/swap/layer_forward.py).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmkern.dispatch import implementation
from llmkern.integrations.transformers.attention import HARMLESS, INTERFACE, registered_places
from llmkern.ops._layer_sizes import needs_of
from llmkern.programs.passes import fused
from llmkern.programs.program import ACTIVATIONS, Program
from llmkern.swap.bound import steps_of
from llmkern.swap.derive import as_before, is_own, mentioned_globals
from llmkern.swap.guard import guarded
from llmkern.swap.layer_call import hidden_size
from llmkern.swap.layer_forward import forward
from llmkern.swap.layer_program import NoProgram, Reading, layer_program
from llmkern.swap.layer_stack import FORGETTING
from llmkern.swap.match import Match, linear_like, remembered
from llmkern.swap.packed_experts import layout_of, registered_experts
from llmkern.swap.rules import attention as attention_rule
from llmkern.swap.stand_ins import is_linear, linear_sizes
from llmkern.swap.surroundings import classes_within
from llmkern.swap.whole_layer import ALIASES, OP, WholeLayer

SWITCHES = ("attention", "norms", "mlp", "rope")

_CACHE = "past_key_values"
_GIVEN = ("hidden", "cos", "sin", "mask", "bias", "alibi", "encoder", "encoder_mask")  # what calls have for the op
_Shapes = tuple[tuple[str, tuple[Any, ...]], ...]


def find(module: nn.Module) -> Match | None:
    missing = implementation(OP, "cpu").backend.missing
    if missing is not None or not is_own(nn.Linear, "forward") or not _is_layer(module):
        return None
    return remembered((classes_within(module), _shapes(module)), module, partial(_recognise, module))


def _is_layer(module: nn.Module) -> bool:
    """Return True if it is the smallest module that holds an attention and the layers of an MLP."""
    return _holds_both(module) and not any(_holds_both(child) for child in module.modules() if child is not module)


def _holds_both(module: nn.Module) -> bool:
    attentions: list[nn.Module] = []
    for child in module.modules():
        if child is not module and _attends(child):
            attentions.append(child)
            if len(attentions) > 2:
                return False
    if not attentions or _attends(module) or type(as_before(module)).forward is nn.Module.forward:  # a list
        return False
    within = {id(child) for attention in attentions for child in attention.modules()}
    others = [as_before(child) for child in module.modules() if id(child) not in within]
    return sum(2 if layout_of(child) else is_linear(child) for child in others) >= 2


def _attends(module: nn.Module) -> bool:
    """Return True if it looks like an attention; its layer's program decides whether it is one."""
    return _asks(module) or attention_rule.is_named(module)


def _asks(module: nn.Module) -> bool:
    """Return True if its forward looks its attention function up."""
    return _looks_up(getattr(type(as_before(module)), "forward", None))  # a scripted module's class has none


@functools.lru_cache(maxsize=4096)
def _looks_up(forward: Callable[..., Any] | None) -> bool:
    return INTERFACE in mentioned_globals(forward)


def _shapes(module: nn.Module) -> _Shapes:
    """All that the sizes of the op's arguments go by."""
    return tuple([(path, tuple(_sizes(child))) for path, child in module.named_modules()])


def _sizes(child: nn.Module) -> Any:
    if linear_like(child):
        yield child.in_features, child.out_features, getattr(child, "bias", None) is None
    else:
        for name, tensor in chain(child._parameters.items(), child._buffers.items()):
            yield name, None if tensor is None else tuple(tensor.shape)


def _recognise(module: nn.Module) -> Match:
    try:
        reading = layer_program(module)
        program = fused(reading.program)
        _check(module, reading, program)
    except NoProgram as error:
        return Match("layer", OP, str(error).split("\n")[0].rstrip(":"), is_whole=True)
    except Exception as error:  # a layer of any origin may be what nobody has thought of, and has its parts
        return Match("layer", OP, f"reading its forward raises {type(error).__name__}: {error}", is_whole=True)
    sizes = _sizes_of(module, program)
    columns = hidden_size(module)
    sample = partial(_sample, str(program), sizes, columns, _widths(program, columns))
    call = sample(torch.float32, torch.device("cpu"))
    reason = implementation(OP, "cpu").why_not(**call)
    if reason is not None:
        return Match("layer", OP, reason, is_whole=True)
    cls = guarded(
        type(module),
        forward,
        ("_llmkern_layer", _whole(module, reading, program, call)),
        *FORGETTING,
        parts=reading.parts,
        within=classes_within(module),
        places=(
            *chain.from_iterable(map(registered_places, _attentions(module))),
            *chain.from_iterable([registered_experts(as_before(m)) for m in module.modules() if layout_of(m)]),
        ),
    )
    return Match("layer", OP, cls=cls, sample=sample, is_whole=True, switches=_switches(program))


def _attentions(module: nn.Module) -> list[Any]:
    return [child for child in module.modules() if _asks(child)]


def _check(module: nn.Module, reading: Reading, program: Program) -> None:
    """Raises `NoProgram` where no call of the layer could be one of the op."""
    if reading.returned is None:
        raise NoProgram("it returns more than the hidden states and arguments that it hands on")
    if others := [name for name in program.inputs if name not in _GIVEN]:
        raise NoProgram(f"there is no way yet to give the op {others[0]}")
    names = {getattr(getattr(child, "config", None), "_attn_implementation", None) for child in _attentions(module)}
    if None in names:
        raise NoProgram("its attention has no config that names its function")
    if "sdpa" in names and any(step.option("softcap") is not None for step in program.steps):
        raise NoProgram("the untouched model leaves out softcap under sdpa; load it with attn_implementation='eager'")


def _whole(module: nn.Module, reading: Reading, program: Program, call: dict[str, Any]) -> WholeLayer:
    """Return the data that the fused forward of the layer needs.  call: a small call of the op."""
    index = reading.placed if any(step.op == "append" for step in program.steps) else ()
    needs = needs_of(program, call["parameters"], call["hidden"], call["inputs"], (), None)
    keys, values, heads = needs.cache or (0, 0, 1)
    kept = needs.kept or (0, 0, 0, 1)
    known = HARMLESS | reading.given
    if not index:
        known -= {_CACHE, *[name for name, alias in ALIASES.items() if alias == _CACHE]}
    parameters = inspect.signature(type(module).forward).parameters.values()
    attending = [step for step in program.steps if step.op == "attention"]
    packed = {
        place.path: linear_sizes(module, place.path).rows
        for step in program.steps
        for place in step.places
        if place.rows is not None
    }
    causal = tuple([steps_of(path) for path, child in module.named_modules() if _asks(child)])
    return WholeLayer(
        program=program,
        positional=tuple([p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD][2:]),
        known=known,
        returned=reading.returned if reading.in_tuple else None,
        zeros=reading.zeros,
        makes_bias=reading.makes_bias,
        index=index,
        cached=(heads, keys // heads, values // heads),
        kept=(kept[3], kept[0] // kept[3], kept[1] // kept[3]),
        turned=next((columns for _, _, columns in needs.angles), 0),
        but_half=reading.but_half,
        wide_angles=reading.wide_angles,
        needs_mask=any(step.option("window") is not None and not step.option("causal") for step in attending),
        causal=causal if any(step.option("causal") for step in attending) else (),
        packed=tuple(packed.items()),
        lookup=steps_of(reading.lookup),
    )


def _switches(program: Program) -> tuple[str, ...]:
    """The switches of `optimize_` that turn parts of it on."""
    ops = {step.op for step in program.steps}
    kinds = {
        "attention": "attention" in ops,
        "norms": any("norm" in op for op in ops),
        "mlp": bool(ops & set(ACTIVATIONS)) or any(step.option("activation") is not None for step in program.steps),
        "rope": "rope" in ops,
    }
    return tuple([switch for switch in SWITCHES if kinds[switch]])


def _widths(program: Program, columns: int) -> dict[str, int]:
    """Columns of cosines and sines, and of an encoder's rows, by the names of the inputs."""
    found: dict[str, int] = {"encoder": columns}
    for step in program.steps:
        if step.op == "rope":
            for name in step.values[-2:]:
                found[name] = int(step.option("rotary") or step.option("dim") or 0)  # type: ignore[arg-type]
    return found


class _Size(NamedTuple):
    """Shape of a tensor.  transposed: it lies in memory as its transpose does, as weights of transformers' Conv1D."""

    shape: tuple[int, ...]
    transposed: bool = False


def _sizes_of(module: nn.Module, program: Program) -> tuple[_Size | None, ...]:
    """Return the sizes of the program's parameters, in its order; None for an absent one."""
    found: list[_Size | None] = []
    for kind, path in program.parameters():
        owner, _, name = path.rpartition(".")
        if kind == "linear":
            sizes = linear_sizes(module, path)
            experts = (sizes.experts,) if sizes.experts else ()
            found.append(_Size((*experts, sizes.rows, sizes.columns), sizes.turned))
            found += [None, _Size((*experts, sizes.rows)) if sizes.bias else None]
        elif kind == "norm":
            held = [p for p in module.get_submodule(path)._parameters.values() if p is not None]
            found += [*[_Size(tuple(p.shape)) for p in held], *[None] * (2 - len(held))]
        else:
            found.append(_Size(tuple(getattr(module.get_submodule(owner), name).shape)))
    return tuple(found)


def _sample(
    text: str,
    sizes: tuple[_Size | None, ...],
    columns: int,
    widths: dict[str, int],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """A small call with the layer's sizes; nobody reads its weights."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def tensor(size: _Size) -> Tensor:
        *experts, rows, columns = size.shape if size.transposed else (0, 0)
        return empty(*experts, columns, rows).mT if size.transposed else empty(*size.shape)

    head = text.split("\n", 1)[0].removeprefix("layer(").removesuffix(")").split(", ")
    return {
        "hidden": empty(1, 2, columns),
        "programs": [text],
        "parameters": [None if size is None else tensor(size) for size in sizes],
        "inputs": [empty(1, 2, widths[name]) if name in widths else None for name in head[1:]],
        "caches": [],
        "past": 0,
        "schemes": "w8a8",
    }
