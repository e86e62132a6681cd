"""Read a layer's program from its forward, and verify it against the forward.

A copy of the layer is run a few times, near and far: short and long, with and without a past, at positions from a
million on, on large values, in float64 and in bfloat16.  Each run has to give the same program, and the program's
reference has to compute what the forward does.  What a forward decides by sizes, dtypes or contents is refused by its
source (`llmkern.swap.observe`).
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmkern.programs.names import tidy, unique
from llmkern.programs.program import Program, ProgramError, Step
from llmkern.programs.run import run
from llmkern.swap.bound import steps_of
from llmkern.swap.guard import UNSEEN, Part, Path, merged, noted
from llmkern.swap.layer_call import INPUTS, KEPT_NAMES, LayerCall, NoProgram, Probe, bias_dims_of, table_widths
from llmkern.swap.match import PROBE_SCALE
from llmkern.swap.observe import Sources
from llmkern.swap.parts import copied
from llmkern.swap.record import Functions, Recorder
from llmkern.swap.recorded_caches import FAR_POSITION
from llmkern.swap.stand_ins import StandIns, linear_sizes
from llmkern.swap.track import Refused
from llmkern.swap.whole_layer import ALIASES, BIAS

__all__ = ["NoProgram", "Reading", "layer_program"]

_INDEX = "layer_idx"
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6}  # of the largest value; some forwards convert to fp32
_PROBES = (
    Probe("on small values", torch.float32, 2, 3),
    Probe("after a past, at positions from a million on", torch.float64, 2, 2, past=5, first=FAR_POSITION),
    Probe("on large values", torch.float64, 1, 5, spread=PROBE_SCALE),
    Probe("in bfloat16, without a mask", torch.bfloat16, 3, 2, past=3, masked=False),
)
_KEPT = Probe("with an encoder's keys and values in its cache", torch.float32, 2, 3, past=4)
_UNBIASED = Probe("without a bias of the scores", torch.float32, 2, 3, past=4, biased=False)
_HALF = Probe("in float16", torch.float16, 2, 3)
_WIDE = Probe("in bfloat16, with angles in float32", torch.bfloat16, 2, 3, tables=torch.float32)


class Reading(NamedTuple):
    """Result of reading a layer.

    program: at the level of its ops.  but_half: it does not hold in float16.  lookup: where the table is whose rows, by
    the tokens' positions, are its sines and cosines side by side; "" where it is given them.
    parts: what the layer's forward reads of the modules in it (llmkern/swap/guard.py).
    placed: paths of the modules that know the layer's place in its cache.  given: names of arguments that it was given.
    returned: what is in the tuple that it returns behind the hidden states: names of arguments that it hands on, "" for
    None; None if it returns something else.  in_tuple: whether it returns a tuple.
    zeros: names of arguments that may be zero, or absent, and in which case the layer returns zeros for them,
        [1, heads, S, an encoder's tokens]; each with the number of heads.
    wide_angles: its cosines and sines may be fp32 whatever its dtype is.
    makes_bias: path of the module that makes the bias of its scores, where it is given none; None where nothing does.
    """

    program: Program
    but_half: bool
    lookup: str
    parts: tuple[Part, ...]
    placed: tuple[Path, ...]
    given: frozenset[str]
    returned: tuple[str, ...] | None
    in_tuple: bool
    zeros: tuple[tuple[str, int], ...]
    wide_angles: bool
    makes_bias: Path | None


class _Run(NamedTuple):
    """Result of one run of a copy.

    by_dtype: whether the source goes by dtypes.  encodes: whether all its attention is said not to be causal.
    returned: as in `Reading`, with None for zeros, which may be an argument's.  The others: as in `Reading`.
    """

    program: Program
    by_dtype: bool
    encodes: bool
    lookup: str
    parts: tuple[Part, ...]
    placed: tuple[Path, ...]
    given: frozenset[str]
    returned: tuple[str | None, ...] | None
    in_tuple: bool
    zeros: tuple[tuple[str, int], ...]
    makes_bias: Path | None


def layer_program(module: nn.Module) -> Reading:
    """Return the layer's program; raises `NoProgram` with the reason if it has none.

    Called under `settled()`, with the layer as it was before any swap."""
    known: dict[Any, Any] = {}
    runs = [_recorded(module, probe, known) for probe in _PROBES]
    found = runs[0].program
    for probe, other in zip(_PROBES[1:], runs[1:], strict=True):
        wider = _merged(found, other.program)
        if wider is None:
            raise NoProgram(f"{probe.how} its forward computes something else:\n{tidy(other.program)}")
        found = wider
    if any(step.op == "keep" for step in found.steps):
        later = _recorded(module, replace(_KEPT, kept=_heads_kept(module, found)), known).program
        if tidy(_in_order(_bare(_kept(found)))) != tidy(_in_order(_bare(later))):
            raise NoProgram(f"{_KEPT.how} its forward computes something else:\n{tidy(later)}")
    if all(each.encodes for each in runs):  # BERT takes a cache where it is a decoder
        found = _without_caches(found, ("append",))
    but_half = any(each.by_dtype for each in runs) and _holds(module, found, _HALF, known) is None
    wide_angles = "cos" in found.inputs and _holds(module, found, _WIDE, known) is not None
    unbiased = _holds(module, found, _UNBIASED, known) if "bias" in found.inputs else None
    makes_bias = None
    if unbiased is not None and unbiased.makes_bias is not None:
        runs.append(unbiased)
        makes_bias = unbiased.makes_bias
    parts = merged(tuple(itertools.chain.from_iterable([each.parts for each in runs])))
    placed = tuple(dict.fromkeys(path for each in runs for path in each.placed))
    given = frozenset(name for each in runs for name in each.given)
    return Reading(
        program=tidy(found),
        but_half=but_half,
        lookup=runs[0].lookup,
        parts=parts,
        placed=placed,
        given=given,
        returned=_returned(runs),
        in_tuple=runs[0].in_tuple,
        zeros=tuple(dict.fromkeys(zero for each in runs for zero in each.zeros)),
        wide_angles=wide_angles,
        makes_bias=makes_bias,
    )


def _holds(module: nn.Module, program: Program, probe: Probe, known: dict[Any, Any]) -> _Run | None:
    """Return another run of the layer if it gives the same program."""
    try:
        found = _recorded(module, probe, known)
    except NoProgram:
        return None
    return None if _merged(program, found.program) is None else found


def _returned(runs: list[_Run]) -> tuple[str, ...] | None:
    """Return what every run returned behind the hidden states; an argument that was zero may be a new one."""
    each_returned = [each.returned for each in runs if each.returned is not None]
    forms = {(each.in_tuple, len(each.returned or ())) for each in runs}
    if len(each_returned) != len(runs) or len(forms) != 1:
        return None
    found = []
    for elements in zip(*each_returned, strict=True):
        names = {element for element in elements if element is not None}
        if len(names) != 1:
            return None
        found.append(names.pop())
    return tuple(found)


def _recorded(module: nn.Module, probe: Probe, known: dict[Any, Any]) -> _Run:
    """Run the copy once; the recorded program must have computed what the forward did.  known: as for `StandIns`."""
    refused = raised = ""
    for width, bias_dims in itertools.product(table_widths(module), bias_dims_of(module)):
        recorder = Recorder(probe.dtype, (probe.batch, probe.length))
        weights = StandIns(module, probe.dtype, probe.spread, known)
        try:
            copy = copied(module, recorder, weights)
        except Refused as error:
            raise NoProgram(str(error)) from None
        call = LayerCall(module, recorder, weights, probe, width, bias_dims)
        sources = Sources(probed=probe.dtype)
        try:
            with Functions(recorder), recorder, sources:
                out = type(copy).forward(copy, call.hidden, **call.arguments)
        except Refused as error:
            refused = refused or str(error)
            continue
        except Exception as error:  # whatever foreign code raises on inputs that it was not made for
            refused = refused or recorder.reason
            raised = raised or f"a copy of it raises {type(error).__name__} {probe.how}: {error}"
            continue
        if recorder.reason or sources.reason:
            raise NoProgram(recorder.reason or sources.reason)
        returned = out
        out = out[0] if isinstance(out, tuple) else out
        if not isinstance(out, Tensor):
            raise NoProgram(f"it returns a {type(out).__name__}")
        try:
            program = recorder.program(out)
        except (Refused, ProgramError) as error:
            refused = refused or str(error)
            continue
        if probe.dtype in _TOLERANCE:
            expected = run(program, call.inputs | recorder.given_later, weights, call.cache)
            difference = float((out.double() - expected.double()).abs().max())
            if not difference <= _TOLERANCE[probe.dtype] * (float(expected.abs().max()) or 1.0):
                raise NoProgram(f"{probe.how} its forward computes something else than\n{tidy(program)}")
        parts = noted(copy)
        if parts is None:
            raise NoProgram(UNSEEN)
        placed, parts = _without_index(parts) if call.past is not None else ((), parts)
        return _Run(
            program=program,
            by_dtype=sources.goes_by_dtype,
            encodes=recorder.causal == {False},
            lookup=recorder.lookup,
            parts=(*parts, *weights.parts),
            placed=placed,
            given=frozenset(n for n, v in call.arguments.items() if v is not None and not _is_zero(recorder, v)),
            returned=_behind(returned, call, recorder),
            in_tuple=isinstance(returned, tuple),
            zeros=tuple([(n, v.shape[1]) for n, v in call.arguments.items() if _is_zero(recorder, v)]),
            makes_bias=_maker(recorder, call),
        )
    raise NoProgram(refused or raised)


def _without_index(parts: tuple[Part, ...]) -> tuple[tuple[Path, ...], tuple[Part, ...]]:
    """Return which module's layer index was read, and the parts without it (the index differs from layer to layer and
    is read at each call).  A forward that reads its index without a cache depends on it otherwise.
    """
    placed = tuple([part.path for part in parts if any(read.name == _INDEX for read in part.reads)])
    kept = [part._replace(reads=tuple([read for read in part.reads if read.name != _INDEX])) for part in parts]
    return placed, tuple(kept)


def _behind(returned: Any, call: LayerCall, recorder: Recorder) -> tuple[str | None, ...] | None:
    """Return the names of arguments that are returned behind the hidden states, as in `_Run`.  A bias that was made
    counts as the one that would have been given.
    """
    names = {id(v): ALIASES.get(name, name) for name, v in call.arguments.items() if isinstance(v, Tensor)}
    names |= {id(bias): BIAS for *_, bias in recorder.made}
    behind = returned[1:] if isinstance(returned, tuple) else ()
    asked = "output_attentions" in call.names  # attention's weights, which there are where they are asked for
    absent = [other is None or (asked and recorder.kind(other) == "weights") for other in behind]
    known = ["" if none else names.get(id(other)) for other, none in zip(behind, absent, strict=True)]
    unknown = [other for other, name in zip(behind, known, strict=True) if name is None]
    zeros = all(_is_zero(recorder, other) and other.shape == call.zeros_shape for other in unknown)
    return tuple(known) if zeros else None


def _is_zero(recorder: Recorder, value: Any) -> bool:
    return isinstance(value, Tensor) and recorder.is_zero(value)


def _maker(recorder: Recorder, call: LayerCall) -> Path | None:
    """Return the path of the module that made the scores' bias, asked for it as `bias_of` asks
    (llmkern/swap/whole_layer.py).
    """
    if len(recorder.made) != 1:
        return None
    path, args, kwargs, _ = recorder.made[0]
    past = 0 if call.past is None else FAR_POSITION
    asked = {"device": call.hidden.device, "past_seen_tokens": past}
    return steps_of(path) if args == (call.probe.length, call.keys) and kwargs == asked else None


def _in_order(program: Program) -> Program:
    """Sort the program's steps into the order in which their results are needed, whatever order they ran in."""
    program = unique(program)
    makers = {value: step for step in program.steps for value in step.results}
    ordered: dict[Step, None] = {}

    def visit(value: str) -> None:
        step = makers.get(value)
        if step is not None and step not in ordered:
            for read in step.reads():
                visit(read)
            ordered[step] = None

    visit(program.result)
    return replace(program, steps=tuple(ordered))


def _merged(one: Program, other: Program) -> Program | None:
    """Merge the programs of two runs, one of which may lack a cache or masks; None if they differ in anything else."""
    if tidy(_in_order(_bare(one))) != tidy(_in_order(_bare(other))):
        return None
    cached = one if _is_cached(one) else other
    lacking = other if cached is one else one
    attending = [step for step in _in_order(lacking).steps if step.op == "attention"]
    in_order = [step for step in _in_order(cached).steps if step.op == "attention"]
    steps = []
    for step in unique(cached).steps:
        if step.op == "attention":
            same = attending[in_order.index(step)]
            if len(same.values) > len(step.values):
                step = replace(step, values=(*step.values, same.values[3]))
            for option in ("causal", "window"):
                if step.option(option) is None and (value := same.option(option)) is not None:
                    step = step.with_options(**{option: value})
        steps.append(step)
    inputs = tuple([name for name in INPUTS if name in (*one.inputs, *other.inputs)])
    return Program(inputs, tuple(steps), unique(cached).result)


def _heads_kept(module: nn.Module, program: Program) -> tuple[int, int]:
    """Return the number of heads in an encoder's keys, and the columns of each."""
    steps = unique(program).steps
    keep = next(step for step in steps if step.op == "keep")
    reader = next(step for step in steps if step.op == "attention" and step.values[1] == keep.results[0])
    maker = next(step for step in steps if keep.values[0] in step.results)
    if maker.op != "linear":
        raise NoProgram("it does more with an encoder's keys than a linear layer does")
    place, dim = maker.places[maker.results.index(keep.values[0])], reader.option("dim")
    assert isinstance(dim, int)
    rows = linear_sizes(module, place.path).rows
    if place.rows is not None:
        begin, end, period = place.rows
        rows = (end - begin) * (rows // period if period else 1)
    return rows // dim, dim


def _kept(program: Program) -> Program:
    """Return the program for calls in which an encoder's keys and values are already in the cache."""
    program = unique(program)
    names: dict[str, str] = {}
    steps = []
    for step in program.steps:
        step = step.renamed(names, step.results)
        if step.op == "keep":
            names.update(zip(step.results, KEPT_NAMES, strict=True))
        else:
            steps.append(step)
    inputs = (*[name for name in program.inputs if name != "encoder"], *KEPT_NAMES)
    return _in_order(Program(inputs, tuple(steps), program.result))


def _is_cached(program: Program) -> bool:
    return any(step.op in ("append", "keep") for step in program.steps)


def _bare(program: Program) -> Program:
    """Return the program without a cache and without masks."""
    return _without_caches(program, ("append", "keep"), masks=False)


def _without_caches(program: Program, caches: tuple[str, ...], masks: bool = True) -> Program:
    program = unique(program)
    names: dict[str, str] = {}
    steps: list[Step] = []
    for step in program.steps:
        step = step.renamed(names, step.results)
        if step.op in caches:
            names.update(zip(step.results, step.values, strict=True))
            continue
        if step.op == "attention" and not masks:
            step = replace(step, values=step.values[:3]).with_options(causal=None, window=None)
        steps.append(step)
    read = {name for step in steps for name in step.reads()}
    inputs = tuple([name for name in INPUTS if name in program.inputs and (name in read or name == "hidden")])
    return Program(inputs, tuple(steps), program.result)
