from __future__ import annotations

import pytest
import torch

from llmkern import dispatch, ops
from llmkern.ops.int8_linear import FEW_ROWS
from llmkern.testing.compare import assert_same_bits

BACKENDS = [impl.backend.name for impl in dispatch.implementations("int8_linear") if impl.backend.missing is None]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with dispatch.use_backend(request.param):
        yield request.param


def weight(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    return codes, torch.rand(n, 1, generator=generator) * 0.01 + 1e-3


@pytest.mark.usefixtures("backend")
def test_values_computed_by_hand() -> None:
    x = torch.tensor([[127.0, 0.6]])  # scale 1: the codes are 127 and 1
    w, scale = torch.tensor([[1, 10]], dtype=torch.int8), torch.tensor([[0.5]])
    bias = torch.tensor([-100.0])
    assert ops.int8_linear(x, w, scale, bias, scheme="w8a8").item() == pytest.approx(-31.5)
    assert ops.int8_linear(x, w, scale, bias, scheme="w8a16").item() == pytest.approx(-33.5)
    assert ops.int8_linear(x, w, scale, bias, scheme="w8a8", activation="relu").item() == 0.0


def test_w8a8_is_quantize_int8_and_int8_matmul() -> None:
    w, scale = weight(24, 40)
    x, bias = torch.randn(7, 40, generator=torch.Generator().manual_seed(1)), torch.ones(24)
    with dispatch.use_backend("torch"):
        codes, row_scale = ops.quantize_int8(x)
        expected = ops.int8_matmul(codes, w, row_scale, scale, bias=bias, activation="silu")
        assert_same_bits(ops.int8_linear(x, w, scale, bias, activation="silu", scheme="w8a8"), expected)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_nan_stays_in_its_row(scheme: str) -> None:
    w, scale = weight(8, 32)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    clean = ops.int8_linear(x, w, scale, scheme=scheme)
    x[2, 5] = float("nan")
    out = ops.int8_linear(x, w, scale, scheme=scheme)
    assert out.isnan().all(-1).tolist() == [False, False, True, False]
    assert_same_bits(out[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize(
    ("dtype", "rows", "expected"),
    [
        (dtype, rows, scheme)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for rows, scheme in ((1, "w8a16"), (FEW_ROWS, "w8a16"), (FEW_ROWS + 1, "w8a8"))
    ],
)
def test_auto_follows_its_documented_rule(dtype: torch.dtype, rows: int, expected: str) -> None:
    w, scale = weight(16, 32)
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert_same_bits(ops.int8_linear(x, w, scale), ops.int8_linear(x, w, scale, scheme=expected))
    other = "w8a8" if expected == "w8a16" else "w8a16"
    assert not torch.equal(ops.int8_linear(x, w, scale), ops.int8_linear(x, w, scale, scheme=other))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_gradient_is_that_of_the_dequantized_layer(backend: str, scheme: str) -> None:
    if not any(i.has_backward for i in dispatch.implementations("int8_linear") if i.backend.name == backend):
        pytest.skip(f"{backend} has no gradient")
    w, scale = weight(24, 40)
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
    bias = torch.zeros(24, requires_grad=True)
    ops.int8_linear(x, w, scale, bias, scheme=scheme).square().sum().backward()
    out = ops.int8_linear(x.detach(), w, scale, bias.detach(), scheme=scheme)
    torch.testing.assert_close(x.grad, 2 * out @ (w * scale), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias.grad, 2 * out.sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "silu", "relu"])
def test_gradients_of_pytorch_s_backend_match_the_reference(activation: str) -> None:
    w, scale = weight(24, 40)
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)) * 0.1
    found = []
    for backend in ("torch", "reference"):
        leaf = x.clone().requires_grad_()
        with dispatch.use_backend(backend):
            ops.int8_linear(leaf, w, scale, activation=activation, scheme="w8a8").square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_more_weights_than_are_dequantized_at_once() -> None:
    w, scale = weight(1100, 1024)
    x = torch.randn(2, 1024, generator=torch.Generator().manual_seed(1))
    out = ops.int8_linear(x, w, scale, scheme="w8a16")
    torch.testing.assert_close(out.double(), x.double() @ (w * scale.double()).T, rtol=1e-4, atol=1e-4)


X, (W, SCALE) = torch.zeros(2, 4), weight(3, 4)


@pytest.mark.parametrize(
    ("exception", "message", "call"),
    [
        (TypeError, "x is torch.int8, expected float32", {"x": X.to(torch.int8)}),
        (TypeError, "w_q is torch.float32, expected torch.int8", {"w_q": W.float()}),
        (TypeError, "w_scale is torch.float64, expected torch.float32", {"w_scale": SCALE.double()}),
        (ValueError, r"w_scale has shape \[4, 1\], expected \[3, 1\]", {"w_scale": torch.ones(4, 1)}),
        (ValueError, r"w_q has K = 4, expected 5", {"x": torch.zeros(2, 5)}),
        (ValueError, "scheme is 'int4', expected 'auto' or", {"scheme": "int4"}),
        (ValueError, "activation is 'elu', expected 'none' or", {"activation": "elu"}),
        (ValueError, "w_q is on cpu, expected meta", {"x": X.to("meta")}),
    ],
)
def test_bad_input(exception: type[Exception], message: str, call: dict) -> None:
    with pytest.raises(exception, match=f"int8_linear: {message}"):
        ops.int8_linear(**({"x": X, "w_q": W, "w_scale": SCALE} | call))
