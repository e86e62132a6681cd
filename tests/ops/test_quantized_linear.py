from __future__ import annotations

from typing import Any

import pytest
import torch

from llmkern import dispatch, ops
from llmkern.packed import PackedWeight
from llmkern.quantization.formats.gguf import GGUF_TYPES
from llmkern.testing.case import Make
from llmkern.testing.cases.quantized_linear import random_packed
from llmkern.testing.compare import assert_same_bits


def arguments(packed: PackedWeight, **others: Any) -> dict[str, Any]:
    return {**packed.tensors, "code": packed.code, "n": packed.n, **others}


def int4(n: int = 8, k: int = 64) -> dict[str, Any]:
    return arguments(random_packed(Make(torch.float32, "cpu", 0), "s4-g32", n, k))


def whole(**change: Any) -> dict[str, Any]:
    """A call as it is dispatched."""
    names = ("zero", "offset", "super_scale", "super_offset", "bias", "residual")
    given = int4() | {"x": torch.randn(2, 64), "activation": "none", "scheme": "a8"}
    return {**dict.fromkeys(names), **given, **change}


INTEGER_PRODUCTS = [
    i.backend.name for i in dispatch.implementations("quantized_linear") if i.why_not(**whole()) is None
]


@pytest.fixture(params=INTEGER_PRODUCTS)
def backend(request):
    with dispatch.use_backend(request.param):
        yield request.param


@pytest.mark.usefixtures("backend")
def test_values_computed_by_hand() -> None:
    """w = 0.5 · (q − 3) of codes 1, 5 and otherwise 3; x in two blocks with scales 1 and 2."""
    codes = torch.full((1, 64), 3, dtype=torch.uint8)
    codes[0, 0], codes[0, 40] = 1, 5
    packed = PackedWeight.from_rows("u4", codes, torch.full((1, 1), 0.5), zero=torch.full((1, 1), 3, dtype=torch.uint8))
    x = torch.zeros(1, 64)
    x[0, :2] = torch.tensor([10.4, 127.0])  # codes 10 and 127
    x[0, 40:42] = torch.tensor([7.0, 254.0])  # 3.5 rounds to 4: 8
    call = arguments(packed, bias=torch.tensor([100.0]), residual=torch.tensor([[1.0]]))
    assert ops.quantized_linear(x, **call).item() == 100 - 10 + 8 + 1
    assert ops.quantized_linear(-x, **call, activation="relu").item() == 100 + 10 - 8 + 1
    if dispatch.forced_backend() != "cpu":
        assert ops.quantized_linear(x, **call, scheme="a16").item() == pytest.approx(100 - 10.4 + 7 + 1)


def test_the_kernels_say_what_they_leave_to_pytorch() -> None:
    cpu = dispatch.implementation("quantized_linear", "cpu")
    if cpu.backend.missing is None:
        assert "the kernels multiply integers" in cpu.why_not(**whole(scheme="a16"))
        assert cpu.why_not(**whole()) is None
        assert cpu.why_not(**whole(scale=int4()["scale"].double())).startswith("scale is torch.float64")


@pytest.mark.usefixtures("backend")
def test_nan_stays_in_its_row() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    clean = ops.quantized_linear(x, **int4())
    x[2, 5] = float("nan")
    out = ops.quantized_linear(x, **int4())
    assert out.isnan().all(-1).tolist() == [False, False, True, False]
    assert_same_bits(out[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", GGUF_TYPES)
def test_blocks_of_a_file_are_multiplied(name: str) -> None:
    """By x whose codes are exact, the sums in fp32 of the weights that gguf's formula has."""
    form = GGUF_TYPES[name]
    make = Make(torch.float32, "cpu", 0)
    blocks = make.randint(0, 256, 19, 512 // form.columns, form.nbytes, dtype=torch.uint8)
    packed = form.read(blocks)
    floats = {n: t for n, t in packed.tensors.items() if t.is_floating_point()}
    sane = {n: torch.full_like(t, 0.01 * (i + 1)) for i, (n, t) in enumerate(floats.items())}
    packed = PackedWeight(packed.code, packed.n, **packed.tensors | sane)
    x = make.randint(-127, 128, 5, 512, dtype=torch.int8).float()
    x.view(5, 16, 32)[..., 0] = 127.0
    exact = x.double() @ packed.dequantized().double().T
    scale = x.abs().double() @ packed.dequantized().double().abs().T
    assert float(((ops.quantized_linear(x, **arguments(packed)).double() - exact).abs() / scale).max()) < 1e-6


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"code": "u3"}, ValueError, "code is 'u3', expected 's8' or 's4'"),
        ({"scheme": "w8a8"}, ValueError, "scheme is 'w8a8', expected 'a8' or 'a16'"),
        ({"n": 40}, ValueError, "n is 40, expected the rows of 1 panels of 16"),
        ({"codes": torch.zeros(1, 2, 300, dtype=torch.uint8)}, ValueError, r"codes has shape \[1, 2, 300\], expected"),
        ({"codes": torch.zeros(1, 2, 256, dtype=torch.int8)}, TypeError, "codes is torch.int8, expected torch.uint8"),
        ({"codes": torch.zeros(1, 3, 256, dtype=torch.uint8)}, ValueError, r"codes has K = 96, expected 64"),
        ({"scale": torch.ones(1, 3, 16)}, ValueError, r"scale has shape \[1, 3, 16\].*multiples of 32"),
        ({"scale": torch.ones(1, 4, 16)}, ValueError, r"scale has shape \[1, 4, 16\].*multiples of 32"),
        ({"scale": torch.ones(1, 2, 16, dtype=torch.uint8)}, TypeError, "scale is torch.uint8, expected torch.float32"),
        ({"zero": torch.zeros(1, 2, 16, dtype=torch.uint8)}, ValueError, "zero is given with code 's4'"),
        ({"super_offset": torch.ones(1, 1, 16)}, ValueError, "super_offset is given without an offset"),
        ({"bias": torch.ones(7)}, ValueError, r"bias has shape \[7\], expected \[8\]"),
        ({"residual": torch.ones(3, 8)}, ValueError, r"residual has shape \[3, 8\], expected \[2, 8\]"),
        ({"x": torch.ones(2, 64, dtype=torch.int8)}, TypeError, "x is torch.int8"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], says: str) -> None:
    call = {"x": torch.randn(2, 64), **int4(), **change}
    with pytest.raises(error, match=f"^quantized_linear: {says}"):
        ops.quantized_linear(**call)
