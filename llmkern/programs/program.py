"""Programs that describe layers: an immutable list of steps over named values, and its one textual form.

    layer(hidden, cos, sin, mask)
      x       = rms_norm(hidden, input_layernorm, eps=1e-06)
      q, k, v = linear(x, self_attn.q_proj, self_attn.k_proj, self_attn.v_proj)
      q, k    = rope(q, k, cos, sin, dim=64)
      k, v    = append(k, v)
      a       = attention(q, k, v, mask, dim=64, scale=0.125, causal)
      h       = linear(a, self_attn.o_proj, residual=hidden)
      y       = rms_norm(h, post_attention_layernorm, eps=1e-06)
      g       = linear(y, mlp.gate_proj, mlp.up_proj, activation=swiglu)
      hidden  = linear(g, mlp.down_proj, residual=h)
      return hidden

The head names the inputs.  A step names its results, its operator, then values, then places, then options, in the
order of `OPERATORS`.  Whitespace within a line means nothing; a name that is assigned again means the newer value.

- A *value* is an identifier.  Its rows are tokens, `[B*S, columns]`; heads lie side by side in a row, `dim` columns
  each.  An optional input (a mask) may be absent from a call.
- A *place* says where parameters are, seen from the layer: the dotted path of a module (`mlp.up_proj`), or of one
  tensor behind an `@` (`@self_attn.sinks`).  `path[a:b]` takes rows a to b of a linear layer's results, and
  `path[a:b/n]` rows a to b of every n: how heads of queries, keys and values are interleaved in one projection.
- An *option* is `name=value`, or a bare word (`causal`) for a flag.  Floats keep a point or an exponent, whole numbers
  have neither; both are written so that they read back as the same number.

`str(program)` and `parse` are inverse: `parse(str(p)) == p`, and `str(parse(t)) == t` for every text that `str` wrote.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

__all__ = [
    "ACTIVATIONS",
    "GATES",
    "OPERATORS",
    "Operator",
    "Option",
    "Parameter",
    "Place",
    "Program",
    "ProgramError",
    "Step",
    "parse",
]

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "quick_gelu", "relu2")
# An activation of the first of two results, times the second: one value.
GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu", "quick_geglu": "quick_gelu"}

Kind = Literal["flag", "whole", "number", "word", "value", "place", "number or place"]


class ProgramError(ValueError):
    """The text is not a valid program, or its steps do not fit together; the message says where and why."""


class Place(NamedTuple):
    """Location of parameters within a layer.

    path: dotted, from the layer on.  tensor: of one tensor (`@path`), not of a module.
    rows: (begin, end, period): rows begin to end of every `period`; period 0: of all.  None: all rows.
    """

    path: str
    tensor: bool = False
    rows: tuple[int, int, int] | None = None

    def __str__(self) -> str:
        text = f"@{self.path}" if self.tensor else self.path
        if self.rows is None:
            return text
        begin, end, period = self.rows
        return f"{text}[{begin}:{end}/{period}]" if period else f"{text}[{begin}:{end}]"


Option = bool | int | float | str | Place


class Parameter(NamedTuple):
    """Parameters that a program mentions: of a "linear" (weight, scale, bias), a "norm" (weight, bias), or one
    "tensor".  path: as in `Place`; rows of the same path are one mention."""

    kind: Literal["linear", "norm", "tensor"]
    path: str


@dataclass(frozen=True)
class Operator:
    """Signature of one kind of step.

    values, places: least and most of them.  results: how many there are, "places": one for each place (one where a
    gate makes one of two), "turned": one for each value but the last two.
    options: their names in the order in which they are written, each with the kind of its value.
    required: options without which there is no step.
    """

    values: tuple[int, int]
    places: tuple[int, int] = (0, 0)
    results: int | Literal["places", "turned"] = 1
    options: dict[str, Kind] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    parameters: Literal["linear", "norm"] | None = None


_NORM: dict[str, Kind] = {"eps": "number", "offset": "number", "dim": "whole", "codes": "flag"}
_MANY = 64

OPERATORS: dict[str, Operator] = {
    # x / rms(x) * (offset + weight) + bias; offset 0 unless given.  dim: of every `dim` columns by themselves (heads).
    # codes: the result is int8 codes with a scale for each row, for linears of int8 weights.
    "rms_norm": Operator((1, 1), (1, 1), options=_NORM, required=("eps",), parameters="norm"),
    "layer_norm": Operator((1, 1), (1, 1), options=_NORM, required=("eps",), parameters="norm"),
    # (y, x + r): the sum, and its norm.
    "add_rms_norm": Operator((2, 2), (1, 1), 2, _NORM, ("eps",), "norm"),
    "add_layer_norm": Operator((2, 2), (1, 1), 2, _NORM, ("eps",), "norm"),
    # x @ weight.T + bias for each place; activation: of ACTIVATIONS for each, or of GATES for two.
    # residual + multiplier * (…), where given, is the last thing done.
    "linear": Operator(
        (1, 1),
        (1, _MANY),
        "places",
        {"activation": "word", "codes": "flag", "multiplier": "number", "residual": "value"},
        parameters="linear",
    ),
    # A weight for each expert, of softmax(linear(x)) or of sigmoid(linear(x)): the largest `top` of them, 0 for the
    # others; normalized: divided by their sum + eps; times scale.  wide: linear(x) is in fp32 whatever x is.
    # correction: one number for each expert, added to the weights for choosing among them only.  groups: of as many
    # experts each; only those in the `group_top` groups with the largest sums of two are chosen from.
    "route": Operator(
        (1, 1),
        (1, 1),
        options={
            "top": "whole",
            "sigmoid": "flag",
            "normalized": "flag",
            "eps": "number",
            "scale": "number",
            "wide": "flag",
            "groups": "whole",
            "group_top": "whole",
            "correction": "place",
        },
        required=("top",),
        parameters="linear",
    ),
    # (x, weights; gate, up, down) or (x, weights; up, down): Σ weight · down(activation(gate(x)) · up(x)) over the
    # experts whose weight is not 0; linear layers whose parameters have a dimension of experts before the others.
    # limit: the gate is at most that, and up within ± that.  offset: added to up.
    "experts": Operator(
        (2, 2),
        (2, 3),
        options={"activation": "word", "limit": "number", "offset": "number"},
        required=("activation",),
        parameters="linear",
    ),
    # (q, k, cos, sin) or (x, cos, sin).  rotary: columns of a head that turn, the first ones; all unless given.
    # interleaved: pairs are neighbours, not halves apart.  half: cos and sin have a column for each column that turns,
    # and only the first half of them is read, one for each pair.
    "rope": Operator(
        (3, 4),
        results="turned",
        options={"dim": "whole", "rotary": "whole", "interleaved": "flag", "half": "flag"},
        required=("dim",),
    ),
    # Keys and values of these tokens join those of the layer's cache; all of them.  Without a cache: themselves.
    # repeat: the cache holds every head so many times, one beside the other.
    "append": Operator((2, 2), results=2, options={"repeat": "whole"}),
    # Keys and values of an encoder's tokens: made in the first call, kept in the layer's cache, and read from there
    # ever after, in calls that are not given the encoder's tokens.  Without a cache: themselves.
    "keep": Operator((2, 2), results=2),
    # (q, k, v) or (q, k, v, mask).  A mask that is given says everything, else causal and window (keys that a query
    # sees, its own included) do; a window without causal means that there has to be a mask.
    # bias: a value, added to the scores: of 4 dimensions that broadcast to [B, heads, queries, keys], or ALiBi's
    # [B*heads, 1, keys].  slopes: ALiBi's, one for each head; sinks: one score for each head.
    "attention": Operator(
        (3, 4),
        options={
            "dim": "whole",
            "scale": "number",
            "causal": "flag",
            "window": "whole",
            "softcap": "number",
            "sinks": "place",
            "slopes": "place",
            "bias": "value",
        },
        required=("dim", "scale"),
    ),
    "add": Operator((2, 2)),
    "mul": Operator((2, 2)),
    # by: a number, or a tensor of one value for each column.
    "scale": Operator((1, 1), options={"by": "number or place"}, required=("by",)),
    # low, high: at most one is absent.
    "clamp": Operator((1, 1), options={"low": "number", "high": "number"}),
    **{name: Operator((1, 1)) for name in ACTIVATIONS},
}


@dataclass(frozen=True)
class Step:
    """`results = op(values, places, options)`."""

    results: tuple[str, ...]
    op: str
    values: tuple[str, ...]
    places: tuple[Place, ...] = ()
    options: tuple[tuple[str, Option], ...] = ()

    def option(self, name: str, default: Option | None = None) -> Option | None:
        """Return the option's value, or the default if it is not written."""
        return dict(self.options).get(name, default)

    def with_options(self, **changes: Option | None) -> Step:
        """Return the step with other options, in their order; None removes one."""
        named = {**dict(self.options), **changes}
        ordered = [(name, named.get(name)) for name in OPERATORS[self.op].options]
        kept = tuple([(name, value) for name, value in ordered if value is not None])
        return Step(self.results, self.op, self.values, self.places, kept)

    def reads(self) -> Iterator[str]:
        """Values that the step reads, in the order in which they are written."""
        yield from self.values
        kinds = OPERATORS[self.op].options
        yield from (value for name, value in self.options if kinds[name] == "value" and isinstance(value, str))

    def renamed(self, names: dict[str, str], results: tuple[str, ...]) -> Step:
        """Return the step with its inputs renamed and with other results."""
        kinds = OPERATORS[self.op].options
        options = tuple(
            [(n, names.get(v, v) if kinds[n] == "value" and isinstance(v, str) else v) for n, v in self.options]
        )
        return Step(results, self.op, tuple([names.get(v, v) for v in self.values]), self.places, options)

    def call(self) -> str:
        """Return the text to the right of the equals sign."""
        arguments = [*self.values, *map(str, self.places)]
        arguments += [name if value is True else f"{name}={value}" for name, value in self.options]
        return f"{self.op}({', '.join(arguments)})"


@dataclass(frozen=True)
class Program:
    """A layer's steps.  inputs: names of what a call passes, hidden states first.  result: the value that is
    returned.
    """

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    result: str

    def __str__(self) -> str:
        return self._text

    @functools.cached_property
    def _text(self) -> str:
        left = [", ".join(step.results) for step in self.steps]
        width = max(map(len, left), default=0)
        lines = [f"layer({', '.join(self.inputs)})"]
        lines += [f"  {names:{width}} = {step.call()}" for names, step in zip(left, self.steps, strict=True)]
        return "\n".join([*lines, f"  return {self.result}"])

    def parameters(self) -> tuple[Parameter, ...]:
        """Parameters that the program mentions, each once, in the order of first mention; `layers_` takes this
        order.
        """
        found: dict[Parameter, None] = {}
        for step in self.steps:
            kind = OPERATORS[step.op].parameters
            for place in step.places:
                found[Parameter("tensor" if place.tensor or kind is None else kind, place.path)] = None
            for _, value in step.options:
                if isinstance(value, Place):
                    found[Parameter("tensor", value.path)] = None
        return tuple(found)

    def check(self) -> Program:
        """Return the program itself; raises `ProgramError` if a step does not match `OPERATORS` or reads an undefined
        value.
        """
        known = set(self.inputs)
        if not self.inputs or len(known) != len(self.inputs):
            raise ProgramError(f"the inputs are {', '.join(self.inputs)}, expected different names, at least one")
        for step in self.steps:
            _check_step(step, known)
            known |= set(step.results)
        if self.result not in known:
            raise ProgramError(f"it returns {self.result}, which no step makes")
        return self


def _check_step(step: Step, known: set[str]) -> None:
    where = f"{', '.join(step.results)} = {step.op}"
    operator = OPERATORS.get(step.op)
    if operator is None:
        raise ProgramError(f"{where}: there is no operator {step.op}")
    for what, given, (least, most) in (
        ("values", len(step.values), operator.values),
        ("places", len(step.places), operator.places),
    ):
        if not least <= given <= most:
            span = str(least) if least == most else f"{least} to {most}"
            raise ProgramError(f"{where}: {given} {what}, expected {span}")
    if missing := [name for name in step.reads() if name not in known]:
        raise ProgramError(f"{where}: there is no value {missing[0]}")
    for name, value in step.options:
        if name not in operator.options:
            raise ProgramError(f"{where}: there is no option {name}")
        if not _fits(operator.options[name], value):
            raise ProgramError(f"{where}: {name} is {value}, expected a {operator.options[name]}")
    if absent := [name for name in operator.required if step.option(name) is None]:
        raise ProgramError(f"{where}: {absent[0]} is not given")
    activation = step.option("activation")
    if activation is not None and activation not in (*ACTIVATIONS, *GATES):
        raise ProgramError(f"{where}: there is no activation {activation}")
    places = 2 + (activation in GATES and step.op == "experts")
    if (activation in GATES or step.op == "experts") and len(step.places) != places:
        raise ProgramError(f"{where}: {activation} takes {places} places, not {len(step.places)}")
    results = operator.results
    if results == "places":
        results = 1 if activation in GATES else len(step.places)
    elif results == "turned":
        results = len(step.values) - 2
    if len(step.results) != results or len(set(step.results)) != results:
        raise ProgramError(f"{where}: {len(step.results)} results, expected {results} of different names")


def _fits(kind: Kind, value: Option) -> bool:
    if kind == "flag":
        return value is True
    if kind == "whole":
        return type(value) is int and value >= 0
    number = type(value) is float and math.isfinite(value)
    place = isinstance(value, Place) and value.tensor and value.rows is None
    if kind == "number or place":
        return number or place
    if kind in ("number", "place"):
        return number if kind == "number" else place
    return isinstance(value, str)


_NAME = r"[A-Za-z_]\w*"
_HEAD = re.compile(r"\s*layer\s*\(([^()]*)\)\s*", re.ASCII)
_LINE = re.compile(rf"\s*({_NAME}(?:\s*,\s*{_NAME})*)\s*=\s*({_NAME})\s*\(([^()]*)\)\s*", re.ASCII)
_RETURN = re.compile(rf"\s*return\s+({_NAME})\s*", re.ASCII)
_VALUE = re.compile(_NAME, re.ASCII)
_PLACE = re.compile(r"(@?)([A-Za-z_]\w*(?:\.\w+)*)(?:\[(\d+):(\d+)(?:/(\d+))?\])?", re.ASCII)
_OPTION = re.compile(rf"({_NAME})\s*=\s*(\S+)", re.ASCII)
_WHOLE = re.compile(r"-?\d+", re.ASCII)


@functools.lru_cache(maxsize=512)
def parse(text: str) -> Program:
    """Parse a program's text.

    Raises `ProgramError` with the line where it is none."""
    lines = [line for line in text.split("\n") if line.strip()]
    head = _HEAD.fullmatch(lines[0]) if lines else None
    if head is None:
        raise ProgramError(f"line 1: {lines[0].strip() if lines else ''!r}, expected layer(hidden, …)")
    inputs = tuple([name.strip() for name in head[1].split(",")])
    if not all(map(_VALUE.fullmatch, inputs)):
        raise ProgramError(f"line 1: the inputs are {head[1]}, expected names")
    last = _RETURN.fullmatch(lines[-1])
    if last is None:
        raise ProgramError(f"line {len(lines)}: {lines[-1].strip()!r}, expected return and a value")
    known, steps = set(inputs), []
    for number, line in enumerate(lines[1:-1], 2):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ProgramError(f"line {number}: {line.strip()!r}, expected names = operator(arguments)")
        try:
            step = _step(match, known)
            _check_step(step, known)
        except ProgramError as error:
            raise ProgramError(f"line {number}: {error}") from None
        known |= set(step.results)
        steps.append(step)
    return Program(inputs, tuple(steps), last[1]).check()


def _step(match: re.Match[str], known: set[str]) -> Step:
    results = tuple([name.strip() for name in match[1].split(",")])
    operator = OPERATORS.get(match[2])
    if operator is None:
        raise ProgramError(f"there is no operator {match[2]}")
    values: list[str] = []
    places: list[Place] = []
    options: dict[str, Option] = {}
    for argument in map(str.strip, match[3].split(",")) if match[3].strip() else ():
        option = _OPTION.fullmatch(argument)
        if option is not None or operator.options.get(argument) == "flag":
            name = argument if option is None else option[1]
            if name in options:
                raise ProgramError(f"{name} is given twice")
            options[name] = True if option is None else _option(operator.options.get(name), name, option[2])
        elif options:
            raise ProgramError(f"{argument} stands behind an option")
        elif argument in known and not places and len(values) < operator.values[1]:
            values.append(argument)
        else:
            places.append(_place(argument))
    order = [name for name in operator.options if name in options]
    if order != list(options):
        raise ProgramError(f"options are {', '.join(options)}, expected the order {', '.join(order)}")
    return Step(results, match[2], tuple(values), tuple(places), tuple(options.items()))


def _option(kind: Kind | None, name: str, text: str) -> Option:
    if kind is None:
        raise ProgramError(f"there is no option {name}")
    if text.startswith("@"):
        return _place(text)
    if kind == "whole" and _WHOLE.fullmatch(text):
        return int(text)
    if kind in ("number", "number or place") and not _WHOLE.fullmatch(text):
        try:
            return float(text)
        except ValueError:
            pass
    if kind in ("word", "value") and _VALUE.fullmatch(text):
        return text
    raise ProgramError(f"{name} is {text}, expected a {kind}")


def _place(text: str) -> Place:
    match = _PLACE.fullmatch(text)
    if match is None:
        raise ProgramError(f"{text} is neither a value nor a place")
    if match[3] is None:
        return Place(match[2], bool(match[1]))
    begin, end, period = int(match[3]), int(match[4]), int(match[5] or 0)
    if not begin < end <= (period or end):
        raise ProgramError(f"{text}: there are no such rows")
    return Place(match[2], bool(match[1]), (begin, end, period))
