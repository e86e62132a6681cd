"""Programs that are read off layers: those of every family, what computes them, and what is refused."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, TEXT, layers, program_of
from layer_models import DECODERS, built
from test_near_misses import _CODE, LINES, with_line
from torch import nn

from llmkern.programs.passes import fused
from llmkern.programs.program import Program, parse
from llmkern.programs.run import dispatched, run
from llmkern.swap.bound import Bound
from llmkern.swap.layer_call import LayerCall, NoProgram, Probe, table_widths
from llmkern.swap.layer_program import layer_program
from llmkern.swap.observe import settled
from llmkern.swap.record import Recorder
from llmkern.swap.stand_ins import StandIns

LAYERS = dict(layers())
WRITTEN = dict(re.findall(r"^## (.+)\n\n(?:```\n)?((?:.|\n)*?)(?:\n```)?\n(?=\n##|\Z)", TEXT.read_text(), re.MULTILINE))


@functools.cache
def program_named(name: str) -> Program | str:
    return program_of(LAYERS[name]())


@pytest.mark.parametrize("name", LAYERS)
def test_family(name: str) -> None:
    program = program_named(name)
    if isinstance(program, str):
        assert WRITTEN[name] == f"No program: {program}."
        return
    together = fused(program)
    assert str(together) == WRITTEN[name], "run python tests/swap/families.py, and read what has changed"
    assert parse(str(together)) == together
    assert _computed(name, together) == pytest.approx(_computed(name, program), rel=1e-9)


def _computed(name: str, program: Program, **call: Any) -> list[float]:
    """A few of the program's results in float64."""
    layer = LAYERS[name]()
    weights = StandIns(layer, torch.float64, 1.0)
    for parameter in sorted(program.parameters()):  # drawn in one order, whatever the program's
        if parameter.kind == "norm":
            weights.norm(parameter.path)
        elif parameter.kind == "tensor":
            weights.tensor(parameter.path)
    draw = torch.Generator().manual_seed(2)
    shapes = {"hidden": (2, 3, 32), "encoder": (2, 5, 32), "mask": (2, 1, 3, 3), "encoder_mask": (2, 1, 3, 5)}
    shapes |= {"bias": (1, 4, 3, 3), "alibi": (8, 1, 3)}
    width = next((s.option("rotary") or s.option("dim") for s in program.steps if s.op == "rope"), 0)
    shapes |= {"cos": (1, 3, int(width)), "sin": (1, 3, int(width))}  # type: ignore[arg-type]
    inputs = {n: torch.randn(shape, generator=draw, dtype=torch.float64) for n, shape in shapes.items()}
    out = run(program, {n: inputs[n] for n in program.inputs}, _InOrder(weights), **call)
    return [float(x) for x in out.flatten()[:50]]


class _InOrder:
    """Weights that depend on their place, not on when they were asked for."""

    def __init__(self, weights: StandIns) -> None:
        self.norm, self.tensor, self._weights = weights.norm, weights.tensor, weights

    def linear(self, path: str, x: torch.Tensor, call: Any) -> torch.Tensor:
        self._weights.generator.manual_seed(sum(map(ord, path)))
        return self._weights.linear(path, x)

    def expert(self, path: str, number: int, x: torch.Tensor, call: Any) -> torch.Tensor:
        self._weights.generator.manual_seed(sum(map(ord, path)))
        return self._weights.expert(path, number, x, call)


@pytest.mark.parametrize("name", [n for n, text in WRITTEN.items() if text.startswith("layer(")])
@torch.no_grad()
def test_with_the_weights_of_the_layer(name: str) -> None:
    """The fused program, through the dispatcher, gives what the layer itself gives."""
    layer = LAYERS[name]()
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape) + (parameter if parameter.dim() == 1 else 0)
    plain = program_named(name)
    assert isinstance(plain, Program)
    program = fused(plain)
    recorder = Recorder(torch.float32, (2, 3))
    probe = Probe("as it is", torch.float32, 2, 3)
    width = table_widths(layer)[name.startswith("gpt-oss")]  # which takes one angle for each pair
    call = LayerCall(layer, recorder, StandIns(layer, torch.float32, 1.0), probe, width, 4)
    if name.startswith("torch.nn"):  # whose fused path takes masks of booleans only
        call.arguments = {n: a for n, a in call.arguments.items() if not n.endswith("mask")}
        call.inputs |= {n: None for n in call.inputs if n.endswith("mask")}
    out = type(layer).forward(layer, call.hidden, **call.arguments)
    expected = out[0] if isinstance(out, tuple) else out
    if "cos" in program.inputs and "cos" not in call.inputs:  # GPT-J looks its angles up itself
        sin, cos = layer.get_buffer("attn.embed_positions")[call.arguments["position_ids"]].chunk(2, -1)
        call.inputs |= {"sin": sin.contiguous(), "cos": cos.contiguous()}
    bound = Bound(program, layer, torch.float32)
    torch.testing.assert_close(run(program, call.inputs, bound, call=dispatched), expected, rtol=1e-4, atol=1e-4)
    assert len(bound.parameters) == sum({"linear": 3, "norm": 2, "tensor": 1}[p.kind] for p in program.parameters())


def test_through_the_dispatcher() -> None:
    for name in ("gemma3 layers.0", "gpt-neox layers.0", "clip encoder.layers.0", "t5 decoder.block.1"):
        program = program_named(name)
        assert isinstance(program, Program)
        expected = _computed(name, program)
        assert _computed(name, fused(program), call=dispatched) == pytest.approx(expected, rel=1e-4, abs=1e-5)


# What a program says as it is, or what its call is checked for: a factor, a limit, dtypes, numbers of dimensions.
SAID = {"another constant", "limit", "branch by dtype", "branch by the number of dimensions"}


@pytest.mark.parametrize("name", LINES)
def test_a_line_more_in_a_forward(name: str) -> None:
    whose, where, line, _ = LINES[name]
    forward = with_line(_CODE[whose], where, line)
    layer = built(DECODERS["llama"]).model.layers[0]
    owner = {"attention": layer.self_attn, "layer": layer, "mlp": layer.mlp, "norm": layer.input_layernorm}[whose]
    owner.__class__ = type(type(owner).__name__, (type(owner),), {"forward": forward})
    with settled():
        if name not in SAID:
            with pytest.raises(NoProgram):
                layer_program(layer)
            return
        reading = layer_program(layer)
    plain = program_of(built(DECODERS["llama"]).model.layers[0])
    assert reading.but_half == (name == "branch by dtype")
    assert ("scale(" in str(reading.program)) == (name == "another constant")
    assert ("clamp(" in str(reading.program)) == (name == "limit")
    assert reading.program == plain or name in ("another constant", "limit")


class _Changed(nn.Module):
    """A layer of a kind that no model has: the parts of a Llama layer, wired otherwise."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = built(DECODERS["llama"]).model.layers[0]
        self.wired = forward

    def forward(self, hidden_states: Any, attention_mask: Any = None, position_embeddings: Any = None) -> Any:
        return self.wired(self.layer, hidden_states, attention_mask, position_embeddings)


def _parallel(layer: Any, x: Any, mask: Any, angles: Any) -> Any:
    n = layer.input_layernorm(x)
    return x + 0.5 * layer.self_attn(n, angles, mask)[0] + layer.mlp(n)


def _sandwich(layer: Any, x: Any, mask: Any, angles: Any) -> Any:
    h = layer.input_layernorm(layer.self_attn(x, angles, mask)[0]) + x
    return layer.post_attention_layernorm(layer.mlp(h)) + h


@pytest.mark.parametrize(
    ("wired", "lines"), [(_parallel, "multiplier=0.5, residual=hidden"), (_sandwich, "add(x, hidden)")]
)
def test_how_parts_are_wired_is_found(wired: Callable[..., Any], lines: str) -> None:
    program = program_of(_Changed(wired))
    assert isinstance(program, Program), program
    assert lines in str(fused(program))


def test_positions_of_a_layer_are_not_numbers_to_compute_with() -> None:
    def forward(layer: Any, x: Any, mask: Any, angles: Any) -> Any:
        return layer.mlp(x) * angles[0][..., :1]

    assert "mul of a table" in str(program_of(_Changed(forward))) or "no one value" in str(
        program_of(_Changed(forward))
    )


def _half_and_long(layer: Any, x: Any, mask: Any, angles: Any) -> Any:
    y = layer.mlp(x)
    if y.dtype == torch.float16 and y.shape[1] > 100:
        y = y / 2
    return y


def test_a_branch_of_one_dtype_by_length_leaves_out_that_dtype() -> None:
    with settled():
        reading = layer_program(_Changed(_half_and_long))
    assert reading.but_half
    assert "scale" not in str(reading.program)


def test_families_are_all_written() -> None:
    assert list(WRITTEN) == list(LAYERS)
    assert {name.split()[0] for name in LAYERS} >= FAMILIES.keys()
