"""linear_kl_div and linear_jsd beside PyTorch's kl_div: directions, temperature, what a teacher gives, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern import ops
from llmkern.backends import _chunked_loss
from llmkern.testing.compare import assert_same_bits

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


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_jsd_is_its_formula(beta: float) -> None:
    call = {name: tensor.detach().double() for name, tensor in inputs().items()}
    call["hidden"].requires_grad_(), call["weight"].requires_grad_()
    s = (F.linear(call["hidden"], call["weight"]) / 2).softmax(-1)
    t = (F.linear(call["teacher_hidden"], call["teacher_weight"]) / 2).softmax(-1)
    m = beta * t + (1 - beta) * s
    formula = 4 * (beta * t * (t / m).log() + (1 - beta) * s * (s / m).log()).sum(-1)
    exact = torch.autograd.grad(formula.mean(), (call["hidden"], call["weight"]))
    for dtype in (torch.float64, torch.float32):
        given = {name: tensor.detach().to(dtype) for name, tensor in call.items()}
        leaves = [given["hidden"].requires_grad_(), given["weight"].requires_grad_()]
        loss = ops.linear_jsd(**given, beta=beta, temperature=2.0)
        torch.testing.assert_close(loss.double(), formula.mean(), rtol=1e-5, atol=0)
        for gradient, wanted in zip(torch.autograd.grad(loss, leaves), exact, strict=True):
            torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-7)


def test_the_ends_of_jsd_are_both_directions() -> None:
    for beta, reverse in ((0, False), (0.0, False), (1.0, True)):
        found = [ops.linear_jsd(**inputs(), beta=beta), ops.linear_kl_div(**inputs(), reverse=reverse)]
        assert_same_bits(*[loss.detach() for loss in found])


def test_logits_of_the_teacher_are_as_good_as_its_head() -> None:
    call = inputs()
    head = {name: call.pop(name) for name in ("teacher_hidden", "teacher_weight")}
    logits = F.linear(*head.values())
    order = torch.randperm(WORDS).expand(12, WORDS)
    for op, options in ((ops.linear_kl_div, {}), (ops.linear_jsd, {"beta": 0.3})):
        expected = op(**call, **head, **options)
        gradient = torch.autograd.grad(expected, call["hidden"])[0]
        for given in (
            {"teacher_logits": logits.clone()},
            {"teacher_logits": logits.gather(1, order), "teacher_words": order},
        ):
            before = {name: tensor.clone() for name, tensor in given.items()}
            loss = op(**call, **given, **options)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(torch.autograd.grad(loss, call["hidden"])[0], gradient)
            assert_same_bits(list(given.values()), list(before.values()))


def test_words_that_the_teacher_leaves_out_have_no_probability() -> None:
    call = inputs()
    logits = F.linear(call.pop("teacher_hidden"), call.pop("teacher_weight"))
    top, words = logits.topk(5)
    labels = torch.arange(12).masked_fill(torch.arange(12) % 3 == 1, -100)
    alone = torch.full_like(logits, -torch.inf).scatter(1, words, top)
    for op, options in ((ops.linear_kl_div, {}), (ops.linear_jsd, {"beta": 0.3})):
        found = op(**call, teacher_logits=top, teacher_words=words, labels=labels, **options)
        torch.testing.assert_close(found, op(**call, teacher_logits=alone, labels=labels, **options))
        assert torch.autograd.grad(found, call["hidden"])[0].isfinite().all()
    p = top.softmax(-1)
    student = F.linear(call["hidden"], call["weight"]).log_softmax(-1).gather(1, words)
    rows = (p * (p.log() - student)).sum(-1)
    torch.testing.assert_close(
        ops.linear_kl_div(**call, teacher_logits=top, teacher_words=words, reduction="none"), rows
    )
    padded = torch.cat([top, torch.full((12, 1), -torch.inf)], 1), torch.cat([words, words[:, :1]], 1)
    again = ops.linear_kl_div(**call, teacher_logits=padded[0], teacher_words=padded[1], reduction="none")
    torch.testing.assert_close(again, rows)  # of a word that is named twice the larger logit counts


def test_autocast_casts_both_heads() -> None:
    call = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_kl_div(**call)
    assert_same_bits(loss.detach(), ops.linear_kl_div(**{n: t.detach().bfloat16() for n, t in call.items()}))
    assert torch.autograd.grad(loss, call["weight"])[0].dtype == torch.float32


NO_HEAD = {"teacher_hidden": None, "teacher_weight": None}
TOP = {"teacher_logits": torch.ones(12, 3), "teacher_words": torch.zeros(12, 3, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher_weight": None}, TypeError, "teacher_weight is None, expected a tensor, or teacher_logits"),
        ({"teacher_logits": torch.ones(12, WORDS)}, ValueError, "teacher_hidden is given beside teacher_logits"),
        (NO_HEAD | {"teacher_logits": torch.ones(12, 9)}, ValueError, r"teacher_logits has shape \[12, 9\], expected"),
        (NO_HEAD | TOP | {"teacher_words": torch.zeros(12, 3)}, TypeError, "teacher_words is torch.float32"),
        (
            NO_HEAD | TOP | {"teacher_words": TOP["teacher_words"][:, :2]},
            ValueError,
            r"teacher_words has shape \[12, 2",
        ),
        (
            NO_HEAD | TOP | {"teacher_words": TOP["teacher_words"] + WORDS},
            ValueError,
            "teacher_words has 50, expected 0",
        ),
        (
            NO_HEAD | {"teacher_logits": torch.ones(12, WORDS, requires_grad=True)},
            ValueError,
            "teacher_logits requires",
        ),
    ],
)
def test_bad_input_of_the_teachers_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    for op in (ops.linear_kl_div, ops.linear_jsd):
        with pytest.raises(error, match=f"^{op.__name__}: {message}"):
            op(**inputs() | change)


def test_bad_input_of_the_side_is_named() -> None:
    call = inputs() | NO_HEAD | TOP
    with pytest.raises(ValueError, match=r"^linear_jsd: beta is 1.5, expected a number from 0 to 1"):
        ops.linear_jsd(**call, beta=1.5)
    with pytest.raises(ValueError, match=r"^linear_jsd: beta is 1 beside teacher_words"):
        ops.linear_jsd(**call, beta=1)
    with pytest.raises(ValueError, match=r"^linear_kl_div: reverse is True beside teacher_words"):
        ops.linear_kl_div(**call, reverse=True)


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
