"""linear_kl_div beside PyTorch's kl_div: both directions, temperature, rows left out, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern import ops
from llmkern.backends import _chunked_loss

WORDS, HIDDEN, TEACHER = 50, 24, 40


def inputs(rows: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "hidden": randn(rows, HIDDEN).requires_grad_(),
        "weight": randn(WORDS, HIDDEN).requires_grad_(),
        "teacher_hidden": randn(rows, TEACHER),
        "teacher_weight": randn(WORDS, TEACHER),
    }


def expected(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    temperature: float = 1.0,
    reverse: bool = False,
) -> Tensor:
    """Each row's by PyTorch."""
    student = (F.linear(hidden, weight) / temperature).log_softmax(-1)
    teacher = (F.linear(teacher_hidden, teacher_weight) / temperature).log_softmax(-1)
    left, right = (student, teacher) if reverse else (teacher, student)
    return F.kl_div(right, left, reduction="none", log_target=True).sum(-1) * temperature**2


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_it_is_pytorchs(reverse: bool, temperature: float) -> None:
    call, options = inputs(), {"reverse": reverse, "temperature": temperature}
    rows = expected(**call, **options)
    leaves = [call["hidden"], call["weight"]]
    for reduction, whole in (("mean", rows.mean()), ("sum", rows.sum()), ("none", rows)):
        loss = ops.linear_kl_div(**call, **options, reduction=reduction)
        torch.testing.assert_close(loss, whole)
        factor = torch.rand(12) if reduction == "none" else torch.tensor(3.0)
        found = torch.autograd.grad((loss * factor).sum(), leaves)
        torch.testing.assert_close(found, torch.autograd.grad((whole * factor).sum(), leaves, retain_graph=True))


def test_rows_left_out_have_no_part() -> None:
    call = inputs()
    labels = torch.arange(12)
    labels[1::4] = -100
    kept = labels != -100
    rows = expected(**call)
    torch.testing.assert_close(ops.linear_kl_div(**call, labels=labels), rows[kept].mean())
    torch.testing.assert_close(ops.linear_kl_div(**call, labels=labels, num_items=5), rows[kept].sum() / 5)
    torch.testing.assert_close(
        ops.linear_kl_div(**call, labels=labels, reduction="none"), torch.where(kept, rows, torch.zeros(()))
    )
    with torch.no_grad():
        call["teacher_hidden"][1] = torch.nan  # nothing reads it
    loss = ops.linear_kl_div(**call, labels=labels)
    torch.testing.assert_close(loss, rows[kept].mean())
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (call["hidden"], call["weight"])))
    scale = torch.rand(12)
    torch.testing.assert_close(
        ops.linear_kl_div(**call, labels=labels, scale=scale, reduction="sum"), (rows * scale)[kept].sum()
    )
    nothing = ops.linear_kl_div(**call, labels=torch.full_like(labels, -100))
    assert nothing.item() == 0
    assert not torch.autograd.grad(nothing, call["hidden"])[0].any()


def test_a_student_like_its_teacher_is_no_distance_away() -> None:
    hidden, weight = inputs()["teacher_hidden"], inputs()["teacher_weight"]
    for reverse in (False, True):
        student = hidden.clone().requires_grad_()
        loss = ops.linear_kl_div(student, weight, hidden, weight, reverse=reverse)
        assert abs(loss.item()) < 1e-6
        assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-6


def test_words_without_a_probability_add_nothing() -> None:
    call = inputs()
    bias = torch.zeros(WORDS)
    bias[7] = -torch.inf
    loss = ops.linear_kl_div(**call, teacher_bias=bias)
    assert loss.isfinite()
    assert ops.linear_kl_div(**call, bias=bias, teacher_bias=bias).isfinite()
    assert torch.autograd.grad(loss, call["hidden"])[0].isfinite().all()
    assert ops.linear_kl_div(**call, bias=bias).item() == torch.inf


def test_chunks_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    call = inputs(rows=50)

    def run() -> list[Tensor]:
        loss = ops.linear_kl_div(**call)
        return [loss.detach(), *torch.autograd.grad(loss, (call["hidden"], call["weight"]))]

    whole = run()
    monkeypatch.setattr(_chunked_loss, "CHUNK_BYTES", 1)  # 16 rows
    torch.testing.assert_close(run(), whole)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"teacher_weight": torch.ones(49, TEACHER)},
            ValueError,
            r"teacher_weight has shape \[49, 40\], expected \[50",
        ),
        (
            {"teacher_hidden": torch.ones(11, TEACHER)},
            ValueError,
            r"teacher_hidden has shape \[11, 40\], expected \[12",
        ),
        ({"teacher_hidden": torch.ones(12, TEACHER, requires_grad=True)}, ValueError, "teacher_hidden requires a grad"),
        ({"teacher_weight": torch.ones(50, TEACHER).half()}, TypeError, "teacher_weight is torch.float16"),
        ({"weight": torch.ones(50, 23)}, ValueError, r"weight has shape \[50, 23\], expected \[V, 24\]"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0, expected a finite number above 0"),
        ({"labels": torch.zeros(12)}, TypeError, "labels is torch.float32, expected torch.int64"),
        ({"reduction": "median"}, ValueError, "reduction is 'median'"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^linear_kl_div: {message}"):
        ops.linear_kl_div(**inputs() | change)
