from __future__ import annotations

import pytest
import torch

from llmkern import dispatch, ops
from llmkern.testing.compare import assert_same_bits

FULL = [impl for impl in dispatch.implementations("quantize_int8") if impl.backend.missing is None]


@pytest.fixture(params=FULL, ids=lambda impl: impl.backend.name)
def backend(request):
    with dispatch.use_backend(request.param.backend.name):
        yield


@pytest.mark.usefixtures("backend")
def test_values_computed_by_hand() -> None:
    x = torch.tensor([[254.0, -254.0, 1.0, 3.0, 2.0, -5.0], [0.0, 127.0, 0.5, 1.5, 2.5, -0.5]])
    q, scale = ops.quantize_int8(x)
    assert scale.tolist() == [[2.0], [1.0]]
    assert q.tolist() == [[127, -127, 0, 2, 1, -2], [0, 127, 0, 2, 2, 0]]  # halves go to the even neighbour


@pytest.mark.usefixtures("backend")
def test_zero_row_threshold_is_exact() -> None:
    below = torch.tensor(2.0**-118).nextafter(torch.tensor(0.0))
    q, scale = ops.quantize_int8(torch.stack([torch.tensor(2.0**-118), below]).unsqueeze(-1))
    assert q.tolist() == [[127], [0]]
    assert scale[1].item() == 0.0
    assert scale[0].item() >= torch.finfo(torch.float32).tiny, "the smallest scale is a normal number"


@pytest.mark.usefixtures("backend")
def test_nan_and_infinity_come_out_as_nan() -> None:
    q, scale = ops.quantize_int8(torch.tensor([[1.0, float("nan")], [float("-inf"), 2.0], [1.0, 2.0]]))
    assert q[:2].tolist() == [[0, 0], [0, 0]]
    assert torch.isnan(q * scale).all(-1).tolist() == [True, True, False]


@pytest.mark.usefixtures("backend")
def test_flushing_subnormals_changes_nothing() -> None:
    x = torch.cat([2.0 ** torch.arange(-118.0, -80).unsqueeze(-1), torch.full((38, 1), 2.0**-126 * 0.999)], -1)
    expected = ops.quantize_int8(x)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        flushed = ops.quantize_int8(x)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(flushed, expected)


def test_every_float16_value_alone_in_its_row_round_trips() -> None:
    x = torch.arange(-32768, 32768).to(torch.int16).view(torch.float16).unsqueeze(-1)
    x = x[x.isfinite().all(-1)]
    q, scale = ops.quantize_int8(x)
    torch.testing.assert_close((q * scale).double(), x.double(), rtol=2.0**-23, atol=0)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="x is torch.int32, expected float32"):
        ops.quantize_int8(torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(TypeError, match="x is a list, expected a Tensor"):
        ops.quantize_int8([1.0])
    with pytest.raises(ValueError, match=r"x has no dimensions, expected \[..., hidden\]"):
        ops.quantize_int8(torch.tensor(1.0))
    with pytest.raises(dispatch.Refused, match="quantize_int8 has no gradient"):
        ops.quantize_int8(torch.ones(2, 2, requires_grad=True))
