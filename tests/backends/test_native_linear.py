"""The linear layers of the CPU backend on every instruction set: exact where products are integers, at any size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmkern import _native, dispatch
from llmkern.testing.judge import assert_accurate, reference

pytestmark = pytest.mark.skipif(_native.reason() is not None, reason=str(_native.reason()))
each_isa = pytest.mark.parametrize("isa", _native.CPU_ISAS, indirect=True)
SIZES = (1, 3, 17, 63, 65, 577)
FEW = 4  # rows at most that stream the weight on any instruction set; twice as many on some, and of integers


def codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def weight(n: int, k: int) -> tuple[Tensor, Tensor]:
    return codes(n, k), torch.rand(n, 1)


def sums(a: Tensor, w: Tensor) -> Tensor:
    return torch.ops.llmkern.int8_matmul(a, w, None, None, None, None, "none", torch.int32)


def exact(a: Tensor, w: Tensor) -> Tensor:
    return (a.double() @ w.double().T).to(torch.int32)


@each_isa
@pytest.mark.parametrize("k", SIZES)
def test_sums_are_exact_at_every_odd_size(isa, k) -> None:
    a, w = codes(577, k), codes(577, k)
    expected = exact(a, w)
    for m in SIZES:
        for n in SIZES:
            assert torch.equal(sums(a[:m], w[:n]), expected[:m, :n]), (m, n)


@each_isa
def test_sums_are_exact_for_every_number_of_rows(isa) -> None:
    a, w = codes(129, 200), codes(50, 200)
    expected = exact(a, w)
    for m in (*range(34), 127, 128, 129):
        assert torch.equal(sums(a[:m], w), expected[:m]), m


@each_isa
@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize("rows", [2 * FEW, 2 * FEW + 1])
def test_the_largest_sums(isa, value, rows) -> None:
    """As long as s32 holds them, over many parts of k; of both signs."""
    a, w = torch.full((rows, 131071), -128, dtype=torch.int8), torch.full((3, 131071), value, dtype=torch.int8)
    assert torch.equal(sums(a, w), exact(a, w))


@each_isa
def test_rows_gigabytes_apart(isa) -> None:
    """Offsets beyond 2³¹ bytes; of the memory between the rows nothing is touched."""
    for rows in (FEW, 2 * FEW):
        x, w = torch.randn(rows, 70), codes(9, 70)
        far_x = torch.empty(2**31 // 4 + 70).as_strided(x.shape, (2**31 // 4 // (rows - 1), 1)).copy_(x)
        far_w = torch.empty(2**31 + 70, dtype=torch.int8).as_strided(w.shape, (2**28, 1)).copy_(w)
        for scheme in ("w8a8", "w8a16"):
            call = (torch.ones(9, 1), None, "none", scheme)
            expected = torch.ops.llmkern.int8_linear(x, w, *call)
            assert torch.equal(torch.ops.llmkern.int8_linear(far_x, far_w, *call), expected)


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "n", "k"),
    # Few rows; odd sizes; several parts of k; many rows; more strips than are packed at once; several passes of parts;
    # rows that tiles multiply where they lie, and their rest; rows that are shared among threads.
    [
        (3, 33, 65),
        (37, 67, 131),
        (33, 17, 1100),
        (600, 33, 450),
        (40, 2100, 64),
        (200, 40, 4200),
        (97, 70, 320),
        (3100, 67, 33),
    ],
)
def test_linear_is_as_accurate_as_pytorch_on_any_number_of_rows(isa, dtype, rows, n, k) -> None:
    """The operator itself, which takes more rows than the dispatcher gives it; a row may only spoil itself."""
    x = torch.randn(rows, k)
    x[0], x[1, 7], x[2, 7] = 0, float("nan"), float("inf")
    call = {"x": x.to(dtype), "weight": (torch.randn(n, k) * k**-0.5).to(dtype), "bias": torch.randn(n).to(dtype)}
    call["activation"] = "gelu"
    assert_accurate("linear", call, torch.ops.llmkern.linear(**call))


@each_isa
@pytest.mark.parametrize("apart", [96, 128, 1024, 100])
@pytest.mark.parametrize("offset", [0, 8])
def test_linear_of_rows_in_a_wider_tensor(isa, apart, offset) -> None:
    """Whole cache lines or not, where tiles read them or copies of them: the same bits."""
    wide, w = torch.randn(70, 1100).bfloat16(), torch.randn(33, 96).bfloat16()
    x = wide.flatten()[offset:].as_strided((70, 96), (apart, 1))
    assert torch.equal(
        torch.ops.llmkern.linear(x, w, None, "gelu"), torch.ops.llmkern.linear(x.clone(), w, None, "gelu")
    )


@each_isa
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 17), (17, 63), (63, 65), (65, 577), (16, 1100)])
def test_int8_linear_gives_a_row_the_same_bits_in_any_company(isa, scheme, n, k) -> None:
    """Sums of floats depend on whether rows are few or many; within each kind the bits are the same."""
    x, (w, scale) = torch.randn(45, k), weight(n, k)
    few = torch.stack([torch.ops.llmkern.int8_linear(row, w, scale, None, "silu", scheme) for row in x])
    many = few if scheme == "w8a8" else torch.ops.llmkern.int8_linear(x, w, scale, None, "silu", scheme)
    for rows in (1, 3, 4, 5, 6, 8, 9, 13, 16, 17, 33, 45):
        together = torch.ops.llmkern.int8_linear(x[:rows], w, scale, None, "silu", scheme)
        assert torch.equal(together, (few if rows <= (2 * FEW if "avx512" in isa else FEW) else many)[:rows])


@each_isa
@pytest.mark.parametrize("k", [1, 3, 17, 63, 65, 577, 131071])
@pytest.mark.parametrize("values", ["random", "all -128", "all 127"])
@pytest.mark.parametrize("rows", [3, 7])
def test_int8_linear_w8a8_is_exact(isa, k, values, rows) -> None:
    """To the bit: the codes of quantize_int8, their products' exact sum, one multiplication by each scale."""
    x, (w, scale) = torch.randn(rows, k), weight(5, k)
    if values != "random":
        w.fill_(int(values.split()[1]))
        x[1], x[2] = 1.0, -1.0
    q, row_scale = reference("quantize_int8", {"x": x})
    expected = (q.double() @ w.double().T).float() * row_scale * scale.T
    assert torch.equal(torch.ops.llmkern.int8_linear(x, w, scale, None, "none", "w8a8"), expected)


@each_isa
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_int8_linear_takes_rows_that_lie_anywhere(isa, scheme) -> None:
    """Rows of the weight apart and unaligned; x in any order; the operator itself also takes weights by column."""
    x, (w, scale) = torch.randn(70, 7), weight(19, 80)
    w = w[:, 3:73]
    for rows in (3, 7):
        expected = torch.ops.llmkern.int8_linear(
            x[:, :rows].T.contiguous(), w.contiguous(), scale, None, "none", scheme
        )
        for stored in (w, w.T.contiguous().T):
            out = torch.ops.llmkern.int8_linear(x[:, :rows].T, stored, scale, None, "none", scheme)
            assert torch.equal(out, expected)


@each_isa
@pytest.mark.parametrize("rows", [FEW, FEW + 1, 2 * FEW, 2 * FEW + 1, 40])
@pytest.mark.parametrize("k", [5, 31, 64, 1000])
def test_weight_only_int8_has_all_bits_of_fp32(isa, rows, k) -> None:
    """Numbers from 2⁻³⁰ to 2³⁰ with full mantissas, infinities, and NaNs that are but one low bit from infinity."""
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(rows, k, generator=generator) * torch.exp2(torch.randint(-30, 31, (rows, k), generator=generator))
    w_q, w_scale = torch.randint(1, 128, (9, k), dtype=torch.int8, generator=generator), torch.ones(9, 1)
    x[1, 0] = torch.inf
    x[2, k - 1] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)
    out = torch.ops.llmkern.int8_linear(x, w_q, w_scale, None, "none", "w8a16")
    exact = x.double() @ w_q.double().T
    bound = x.double().abs() @ w_q.double().T * 2**-21
    assert out[1].eq(torch.inf).all()
    assert out[2].isnan().all()
    kept = [r for r in range(rows) if r not in (1, 2)]
    assert ((out.double() - exact).abs() <= bound)[kept].all()


ROWS = {
    "zeros": lambda k: torch.zeros(k),
    "negative zeros": lambda k: -torch.zeros(k),
    "NaN": lambda k: torch.randn(k).index_fill_(0, torch.tensor(k // 2), torch.nan),
    "all NaN": lambda k: torch.full((k,), torch.nan),
    "infinity": lambda k: torch.randn(k).index_fill_(0, torch.tensor(0), -torch.inf),
    "tiny": lambda k: torch.randn(k) * 2.0**-100,
    "tiniest": lambda k: torch.full((k,), 2.0**-149),
    "huge": lambda k: torch.randn(k) * 2.0**100,
    "one of all": lambda k: torch.randn(k).index_fill_(0, torch.tensor(k - 1), 2.0**100),
}


@each_isa
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("k", [5, 64, 577])
def test_weight_only_int8_of_a_row_beside_any_other(isa, kind, k) -> None:
    """Few rows are in fixed point where all can be: one that cannot leaves the others their bits, in every place."""
    w, scale = weight(17, k)
    bias, good = torch.randn(17), torch.randn(FEW, k)

    def linear(x: Tensor, bias: Tensor | None = bias) -> Tensor:
        return torch.ops.llmkern.int8_linear(x, w, scale, bias, "none", "w8a16")

    other = ROWS[kind](k)
    expected, alone = linear(good), linear(other[None])[0]
    for place in range(FEW):
        x = good.clone()
        x[place] = other
        out = linear(x)
        kept = [r for r in range(FEW) if r != place]
        assert torch.equal(out[kept], expected[kept])
        torch.testing.assert_close(out[place], alone, rtol=0, atol=0, equal_nan=True)
    alone = linear(other[None], None)[0].double()
    # Rounded as fp32 would round the sum, and each number to a part of the row's largest.
    exact = other.double() @ w.double().T * scale.T[0].double()
    rounding = other.double().abs() * 2**-21 + other.double().abs().max() * 2**-31
    bound = rounding @ w.double().abs().T * scale.T[0].double() + 2.0**-149
    if exact.isfinite().all():
        assert ((alone - exact).abs() <= bound).all()
    else:
        assert not alone.isfinite().any()


@each_isa
@pytest.mark.parametrize("rows", [1, FEW])
@pytest.mark.parametrize("k", [131071, 131073])
def test_the_longest_sums_of_weight_only_int8(isa, rows, k) -> None:
    """Each number's second digit to the base 256 is -128, as every weight is: beyond 131071 of them no s32 holds it."""
    x = torch.full((rows, k), 251.0 * 2**23)
    x[:, 0] = 127.0 * 2**24
    w = torch.full((3, k), -128, dtype=torch.int8)
    out = torch.ops.llmkern.int8_linear(x, w, torch.ones(3, 1), None, "none", "w8a16")
    exact = x.double() @ w.double().T
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-21).all()


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        (None, {}),
        (None, {"x": torch.zeros(2, 16)[:, ::2]}),
        (None, {"x": torch.zeros(5000, 8)}),
        ("the rows of w_q have stride 6; only 1 is taken", {"w_q": torch.zeros(8, 6, dtype=torch.int8).T}),
        ("w_scale is not contiguous", {"w_scale": torch.ones(6, 2)[:, :1]}),
        ("bias is torch.float64; float32, bfloat16 and float16 are taken", {"bias": torch.zeros(6).double()}),
        ("takes float32, bfloat16, float16, not float64", {"x": torch.zeros(2, 8).double()}),
    ],
)
def test_int8_linear_says_what_it_cannot_serve(reason, change) -> None:
    call = {"x": torch.zeros(2, 8), "w_q": torch.zeros(6, 8, dtype=torch.int8), "w_scale": torch.ones(6, 1)}
    call |= {"bias": None, "activation": "none", "scheme": "w8a8"} | change
    said = dispatch.implementation("int8_linear", "cpu").why_not(**call)
    assert said == reason if reason is None else said.startswith(reason)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        (None, {}),
        ("the rows of w_q have stride 6; only 1 is taken", {"w_q": torch.zeros(8, 6, dtype=torch.int8).T}),
        ("a_scale is not contiguous", {"a_scale": torch.ones(2, 2)[:, :1]}),
        ("residual is torch.float64; float32, bfloat16 and float16", {"residual": torch.zeros(2, 6).double()}),
    ],
)
def test_int8_matmul_says_what_it_cannot_serve(reason, change) -> None:
    call = {"a_q": torch.zeros(2, 8, dtype=torch.int8), "w_q": torch.zeros(6, 8, dtype=torch.int8), "w_scale": None}
    call |= {"a_scale": None, "bias": None, "residual": None, "activation": "none", "out_dtype": torch.float32} | change
    said = dispatch.implementation("int8_matmul", "cpu").why_not(**call)
    assert said == reason if reason is None else said.startswith(reason)


def test_linear_says_what_it_cannot_serve() -> None:
    linear = dispatch.implementation("linear", "cpu")
    call = {"x": torch.zeros(FEW, 8), "weight": torch.zeros(6, 8), "bias": None, "activation": "none"}
    assert linear.why_not(**call) is None
    assert linear.why_not(**call | {"x": torch.zeros(2 * FEW, 8)}).startswith("x has more than 4 rows: ")
    in_bf16 = {name: torch.zeros(2 * FEW, 8, dtype=torch.bfloat16) for name in ("x", "weight")}
    assert (linear.why_not(**call | in_bf16) is None) == (_native.cpu_isa() == "avx512_bf16")
    assert (
        linear.why_not(**call | {"weight": torch.zeros(8, 6).T}) == "the rows of weight have stride 6; only 1 is taken"
    )
