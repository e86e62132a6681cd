"""Each pass on a few lines, and where it must leave things alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llmkern.programs import passes
from llmkern.programs.names import tidy, unique
from llmkern.programs.program import Place, Program, parse

Pass = Callable[[Program], Program]


def layer(*lines: str, inputs: str = "hidden, cos, sin", result: str = "hidden") -> Program:
    return tidy(parse("\n".join([f"layer({inputs})", *lines, f"return {result}"])))


CASES: dict[str, tuple[Pass, Program, Program]] = {
    "linear layers of one value": (
        passes.one_product,
        layer("q = linear(hidden, q)", "k = linear(hidden, k)", "hidden = mul(q, k)"),
        layer("q, k = linear(hidden, q, k)", "hidden = mul(q, k)"),
    ),
    "not of two": (
        passes.one_product,
        layer("q = linear(hidden, q)", "k = linear(q, k)", "hidden = mul(q, k)"),
        layer("q = linear(hidden, q)", "k = linear(q, k)", "hidden = mul(q, k)"),
    ),
    "an activation": (
        passes.gates_and_activations,
        layer("u = linear(hidden, up)", "g = gelu(u)", "hidden = linear(g, down)"),
        layer("g = linear(hidden, up, activation=gelu)", "hidden = linear(g, down)"),
    ),
    "not of what is read twice": (
        passes.gates_and_activations,
        layer("u = linear(hidden, up)", "g = gelu(u)", "hidden = mul(g, u)"),
        layer("u = linear(hidden, up)", "g = gelu(u)", "hidden = mul(g, u)"),
    ),
    "a gate": (
        passes.gates_and_activations,
        layer(
            "g = linear(hidden, gate)",
            "g = silu(g)",
            "u = linear(hidden, up)",
            "g = mul(u, g)",
            "hidden = linear(g, down)",
        ),
        layer("g = linear(hidden, gate, up, activation=swiglu)", "hidden = linear(g, down)"),
    ),
    "a gate in one projection with up": (
        passes.gates_and_activations,
        layer(
            "u, g = linear(hidden, both[0:8], both[8:16])", "g = silu(g)", "g = mul(g, u)", "hidden = linear(g, down)"
        ),
        layer("g = linear(hidden, both[8:16], both[0:8], activation=swiglu)", "hidden = linear(g, down)"),
    ),
    "a gate that has no name": (
        passes.gates_and_activations,
        layer("g = linear(hidden, gate)", "g = relu2(g)", "u = linear(hidden, up)", "hidden = mul(g, u)"),
        layer("g = linear(hidden, gate, activation=relu2)", "u = linear(hidden, up)", "hidden = mul(g, u)"),
    ),
    "two rotations": (
        passes.one_rotation,
        layer(
            "q, k = linear(hidden, q, k)",
            "k = rope(k, cos, sin, dim=8)",
            "q = rope(q, cos, sin, dim=8)",
            "hidden = mul(q, k)",
        ),
        layer("q, k = linear(hidden, q, k)", "q, k = rope(q, k, cos, sin, dim=8)", "hidden = mul(q, k)"),
    ),
    "not two that differ": (
        passes.one_rotation,
        layer(
            "q, k = linear(hidden, q, k)",
            "q = rope(q, cos, sin, dim=8)",
            "k = rope(k, cos, sin, dim=4)",
            "hidden = mul(q, k)",
        ),
        layer(
            "q, k = linear(hidden, q, k)",
            "q = rope(q, cos, sin, dim=8)",
            "k = rope(k, cos, sin, dim=4)",
            "hidden = mul(q, k)",
        ),
    ),
    "a residual": (
        passes.residuals,
        layer("u = linear(hidden, o)", "u = scale(u, by=0.5)", "hidden = add(u, hidden)"),
        layer("hidden = linear(hidden, o, multiplier=0.5, residual=hidden)"),
    ),
    "residuals of two products": (
        passes.residuals,
        layer("u = linear(hidden, o)", "t = linear(hidden, p)", "h = add(t, u)", "hidden = add(h, hidden)"),
        layer("h = linear(hidden, o, residual=hidden)", "hidden = linear(hidden, p, residual=h)"),
    ),
    "no residual of what is read twice": (
        passes.residuals,
        layer("u = linear(hidden, o)", "h = add(hidden, u)", "hidden = mul(h, u)"),
        layer("u = linear(hidden, o)", "h = add(hidden, u)", "hidden = mul(h, u)"),
    ),
    "a sum before a norm": (
        passes.add_norms,
        layer(
            "x = rms_norm(hidden, a, eps=1e-06)",
            "h = add(hidden, x)",
            "y = rms_norm(h, b, eps=1e-06)",
            "hidden = mul(h, y)",
        ),
        layer(
            "x = rms_norm(hidden, a, eps=1e-06)", "y, h = add_rms_norm(x, hidden, b, eps=1e-06)", "hidden = mul(h, y)"
        ),
    ),
    "codes": (
        lambda program: passes.quantized(program, lambda place: place != Place("head")),
        layer(
            "x = rms_norm(hidden, a, eps=1e-06)",
            "g = linear(x, up, activation=gelu)",
            "u = linear(g, down)",
            "y = rms_norm(u, b, eps=1e-06)",
            "hidden = linear(y, head)",
        ),
        layer(
            "x = rms_norm(hidden, a, eps=1e-06, codes)",
            "g = linear(x, up, activation=gelu, codes)",
            "u = linear(g, down)",
            "y = rms_norm(u, b, eps=1e-06)",
            "hidden = linear(y, head)",
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_pass(name: str) -> None:
    run, before, after = CASES[name]
    assert str(run(before)) == str(after)


def test_names_are_used_again_only_when_nothing_reads_the_older_value() -> None:
    program = layer("t = linear(hidden, a)", "s = linear(t, b)", "r = mul(t, s)", "hidden = add(r, hidden)")
    assert str(program).splitlines()[1:-1] == [
        "  u      = linear(hidden, a)",
        "  u2     = linear(u, b)",
        "  g      = mul(u, u2)",
        "  hidden = add(g, hidden)",
    ]
    assert tidy(unique(program)) == program


def test_a_place_and_a_value_have_no_name_in_common() -> None:
    assert "u2" in str(layer("t = linear(hidden, u)", "hidden = gelu(t)"))
