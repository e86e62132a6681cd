from __future__ import annotations

from functools import partial

from llmkern.testing.case import Call, Make, each_dtype


def _call(make: Make, rows: tuple[int, ...], n: int, k: int, *, bias: bool = False, activation: str = "none") -> Call:
    """Results of size 1."""
    return {
        "x": make.randn(*rows, k),
        "weight": make.randn(n, k, scale=max(k, 1) ** -0.5),
        "bias": make.randn(n) if bias else None,
        "activation": activation,
    }


def _strided(make: Make) -> Call:
    """The rows of both are longer than what is used of them, and the weight's start anywhere."""
    call = _call(make, (3,), 17, 80, bias=True)
    return call | {"x": call["x"][:, 5:70], "weight": call["weight"][:, 3:68]}


def _strided_empty(make: Make) -> Call:
    """No rows, of elements that would not lie side by side: PyTorch calls that contiguous, whatever the strides."""
    call = _call(make, (0,), 8, 32, bias=True)
    return call | {name: call[name][:, ::2] for name in ("x", "weight")}


def _special_rows(make: Make) -> Call:
    """A zero row, and rows with a NaN and an infinity; each may only spoil itself."""
    call = _call(make, (4,), 8, 64, bias=True)
    call["x"][0] = 0
    call["x"][1, 7] = float("nan")
    call["x"][2, 7] = float("inf")
    return call


_GRAD = ("x", "weight", "bias")
CASES = [
    *[
        case
        for rows, n, k in (
            ((1,), 1, 1),
            ((3,), 7, 5),
            ((2, 2), 9, 17),
            ((1,), 577, 63),
            ((4,), 65, 577),
            ((17,), 63, 65),
        )
        for case in each_dtype("linear", f"{rows}x{n}x{k}", partial(_call, rows=rows, n=n, k=k), differentiable=_GRAD)
    ],
    *[
        case
        for activation in ("none", "gelu", "gelu_tanh", "silu", "relu")
        for case in each_dtype(
            "linear",
            f"bias-{activation}",
            partial(_call, rows=(3,), n=24, k=40, bias=True, activation=activation),
            differentiable=_GRAD,
        )
    ],
    *each_dtype("linear", "strided", _strided, differentiable=_GRAD),
    *each_dtype("linear", "strided-empty", _strided_empty),
    *each_dtype("linear", "special-rows", _special_rows),
    *[
        case
        for rows, n, k in (((0,), 8, 16), ((3,), 0, 16), ((3,), 8, 0))
        for case in each_dtype("linear", f"{rows}x{n}x{k}", partial(_call, rows=rows, n=n, k=k, bias=True))
    ],
]
