from __future__ import annotations

import pytest
import torch

from llmkern import dispatch, ops
from llmkern.ops.int8_matmul import MAX_K

BACKENDS = [impl.backend.name for impl in dispatch.implementations("int8_matmul") if impl.backend.missing is None]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with dispatch.use_backend(request.param):
        yield


def int8(rows: list) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int8)


@pytest.mark.usefixtures("backend")
def test_values_computed_by_hand() -> None:
    a, w = int8([[1, 2], [3, -4]]), int8([[10, 20], [-5, 6]])
    assert ops.int8_matmul(a, w, out_dtype=torch.int32).tolist() == [[50, 7], [-50, -39]]
    out = ops.int8_matmul(a, w, torch.tensor([[0.5], [2.0]]), torch.tensor([[1.0], [10.0]]))
    assert out.dtype == torch.float32
    assert out.tolist() == [[25.0, 35.0], [-100.0, -780.0]]


@pytest.mark.usefixtures("backend")
def test_activation_acts_after_the_bias_and_before_the_residual() -> None:
    out = ops.int8_matmul(
        int8([[1]]), int8([[3]]), bias=torch.tensor([-5.0]), residual=torch.tensor([[-7.0]]), activation="relu"
    )
    assert out.tolist() == [[-7.0]]


@pytest.mark.usefixtures("backend")
def test_every_number_of_rows_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randint(-128, 128, (24, 56), generator=generator, dtype=torch.int8)
    for rows in range(70):
        a = torch.randint(-128, 128, (rows, 56), generator=generator, dtype=torch.int8)
        assert torch.equal(ops.int8_matmul(a, w, out_dtype=torch.int32).long(), a.long() @ w.long().T)


def test_a_flat_weight_scale_means_the_same() -> None:
    a, w, scale = int8([[1, 2]]), int8([[3, 4], [5, 6]]), torch.tensor([0.5, 2.0])
    assert torch.equal(ops.int8_matmul(a, w, None, scale), ops.int8_matmul(a, w, None, scale.unsqueeze(1)))


A, W, ONE = torch.zeros(2, 4, dtype=torch.int8), torch.zeros(3, 4, dtype=torch.int8), torch.ones(2, 1)


@pytest.mark.parametrize(
    ("exception", "message", "call"),
    [
        (TypeError, "a_q is torch.float32, expected torch.int8", {"a_q": A.float()}),
        (TypeError, "w_q is torch.uint8, expected torch.int8", {"w_q": W.to(torch.uint8)}),
        (TypeError, "a_scale is torch.bfloat16, expected torch.float32", {"a_scale": ONE.bfloat16()}),
        (TypeError, "out_dtype is torch.int64, expected float32", {"out_dtype": torch.int64}),
        (TypeError, "bias is torch.int64, expected float32", {"bias": torch.zeros(3, dtype=torch.int64)}),
        (ValueError, r"a_q has no dimensions", {"a_q": A[0, 0]}),
        (ValueError, r"w_q has 1 dimensions, expected \[N, K\]", {"w_q": W[0]}),
        (ValueError, r"w_q has K = 4, expected 5", {"a_q": torch.zeros(2, 5, dtype=torch.int8)}),
        (ValueError, r"a_scale has shape \[2\], expected \[2, 1\]", {"a_scale": ONE[:, 0]}),
        (ValueError, r"w_scale has shape \[2, 1\], expected \[3, 1\]", {"w_scale": ONE}),
        (ValueError, r"bias has shape \[2\], expected \[3\]", {"bias": torch.zeros(2)}),
        (ValueError, r"residual has shape \[3\], expected \[2, 3\]", {"residual": torch.zeros(3)}),
        (ValueError, "residual is on meta, expected cpu", {"residual": torch.zeros(2, 3, device="meta")}),
        (ValueError, "activation is 'tanh', expected 'none' or", {"activation": "tanh"}),
        (ValueError, "a_scale is given with out_dtype=int32", {"a_scale": ONE, "out_dtype": torch.int32}),
        (ValueError, "activation is 'relu', expected 'none'", {"activation": "relu", "out_dtype": torch.int32}),
        (
            ValueError,
            "K is 131072, at most 131071",
            {"a_q": A[:, :1].expand(2, MAX_K + 1), "w_q": W[:, :1].expand(3, MAX_K + 1)},
        ),
    ],
)
def test_bad_input(exception: type[Exception], message: str, call: dict) -> None:
    with pytest.raises(exception, match=f"int8_matmul: {message}"):
        ops.int8_matmul(**({"a_q": A, "w_q": W} | call))


def test_no_gradient_is_cut_silently() -> None:
    with pytest.raises(dispatch.Refused, match="int8_matmul has no gradient"):
        ops.int8_matmul(A, W, bias=torch.zeros(3, requires_grad=True))
