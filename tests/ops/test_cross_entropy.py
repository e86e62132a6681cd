"""cross_entropy and linear_cross_entropy beside PyTorch's: reductions, counts, defined values, bad input, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern import ops
from llmkern.backends import _chunked_loss
from llmkern.testing.compare import assert_same_bits

WORDS, HIDDEN = 50, 24


def inputs(rows: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias and labels, some of which are ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(rows, HIDDEN, generator=generator), torch.randn(WORDS, HIDDEN, generator=generator)
    labels = torch.randint(0, WORDS, (rows,), generator=generator)
    labels[1::4] = -100
    return hidden, weight, torch.randn(WORDS, generator=generator), labels


def both(hidden: Tensor, head: Tensor, labels: Tensor, **options: Any) -> list[Tensor]:
    """The loss by each of the two ops."""
    named = {"class_weight" if name == "weight" else name: value for name, value in options.items()}
    return [
        ops.cross_entropy(F.linear(hidden, head), labels, **options),
        ops.linear_cross_entropy(hidden, head, labels, **named),
    ]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_reductions_are_pytorchs(reduction: str, weighted: bool, smoothing: float) -> None:
    hidden, weight, _, labels = inputs()
    options = {"reduction": reduction, "label_smoothing": smoothing}
    options |= {"weight": torch.rand(WORDS)} if weighted else {}
    expected = F.cross_entropy(F.linear(hidden, weight), labels, **options)
    for loss in both(hidden, weight, labels, **options):
        torch.testing.assert_close(loss, expected)


def test_gradients_are_pytorchs() -> None:
    """With a factor behind the loss, which the kept gradients have to be multiplied with, and each row by its own."""
    for reduction, factor in (("mean", torch.tensor(3.0)), ("sum", torch.tensor(1.0)), ("none", torch.rand(12))):
        found = []
        for op in (
            lambda h, w, b, y, r=reduction: ops.linear_cross_entropy(h, w, y, b, reduction=r),
            lambda h, w, b, y, r=reduction: ops.cross_entropy(F.linear(h, w, b), y, reduction=r),
            lambda h, w, b, y, r=reduction: F.cross_entropy(F.linear(h, w, b), y, reduction=r),
        ):
            *leaves, labels = inputs()
            leaves = [leaf.requires_grad_() for leaf in leaves]
            found.append(torch.autograd.grad((op(*leaves, labels) * factor).sum(), leaves))
        torch.testing.assert_close(found[0], found[2])
        torch.testing.assert_close(found[1], found[2])


def test_a_mean_over_num_items_is_transformers() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    hidden, weight, _, labels = inputs()
    for items in (7, torch.tensor(7)):
        expected = ForCausalLMLoss(
            F.linear(hidden, weight), None, WORDS, num_items_in_batch=torch.as_tensor(items), shift_labels=labels
        )
        for loss in both(hidden, weight, labels, num_items=items):
            torch.testing.assert_close(loss, expected)


def test_where_all_labels_are_ignored_loss_and_gradients_are_0() -> None:
    hidden, weight, _, labels = inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    for loss in both(hidden, weight, torch.full_like(labels, -100)):
        assert loss.item() == 0
        assert all(not gradient.any() for gradient in torch.autograd.grad(loss, (hidden, weight)))


def test_chunks_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, labels = inputs(rows=50)
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]

    def run() -> list[Tensor]:
        loss = ops.linear_cross_entropy(hidden, weight, labels, bias)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    whole = run()
    monkeypatch.setattr(_chunked_loss, "CHUNK_BYTES", 1)  # 16 rows
    torch.testing.assert_close(run(), whole)


def test_frozen_and_tied_and_int8_heads() -> None:
    hidden, weight, _, labels = inputs()
    hidden.requires_grad_()
    ops.linear_cross_entropy(hidden, weight, labels).backward()  # as under LoRA: the head has no gradient
    expected = torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight), labels), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected)

    tied = torch.nn.Parameter(weight.clone())
    words = torch.arange(12)
    ops.linear_cross_entropy(F.embedding(words, tied), tied, labels).backward()
    other = torch.nn.Parameter(weight.clone())
    F.cross_entropy(F.linear(F.embedding(words, other), other), labels).backward()
    torch.testing.assert_close(tied.grad, other.grad)

    codes, scale = torch.randint(-127, 128, (WORDS, HIDDEN), dtype=torch.int8), torch.rand(WORDS, 1) / 100
    loss = ops.linear_cross_entropy(hidden, codes, labels, weight_scale=scale)
    exact = F.cross_entropy(F.linear(hidden, codes * scale), labels)
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], torch.autograd.grad(exact, hidden)[0])


def test_autocast_casts_as_for_a_linear_layer() -> None:
    hidden, weight, _, labels = inputs()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_cross_entropy(hidden, weight, labels)
    expected = ops.linear_cross_entropy(hidden.bfloat16(), weight.detach().bfloat16(), labels)
    assert_same_bits(loss.detach(), expected)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.dtype == torch.float32


def test_a_scaled_loss_lifts_the_gradients_of_fp16() -> None:
    """A mean over many rows has gradients below fp16's smallest numbers; a scaler's factor comes in the backward."""
    hidden, weight, _, labels = inputs(rows=4)
    hidden, weight = hidden.half().requires_grad_(), weight.half()
    items, factor = 1 << 20, float(1 << 20)
    (ops.linear_cross_entropy(hidden, weight, labels, num_items=items) * factor).backward()
    exact = hidden.detach().double().requires_grad_()
    F.cross_entropy(F.linear(exact, weight.double()), labels, reduction="sum").backward()
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.full((12,), WORDS)}, ValueError, r"labels has 50, expected 0 to 49 or -100 \(ignore_index\)"),
        ({"labels": torch.full((12,), -1)}, ValueError, "labels has -1, expected 0 to 49"),
        ({"labels": torch.zeros(11, dtype=torch.int64)}, ValueError, r"labels has shape \[11\], expected \[12\]"),
        ({"labels": torch.zeros(12)}, TypeError, "labels is torch.float32, expected torch.int64"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5, expected a number from 0 to 1"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0, expected a finite number that is not negative"),
        ({"reduction": "median"}, ValueError, "reduction is 'median', expected 'mean' or 'sum' or 'none'"),
        ({"reduction": "sum", "num_items": 3}, ValueError, "num_items is given with reduction='sum'"),
        ({"weight": torch.ones(3)}, ValueError, r"weight has shape \[3\], expected \[50\]"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    hidden, weight, _, labels = inputs()
    call = {"labels": labels} | change
    with pytest.raises(error, match=f"^cross_entropy: {message}"):
        ops.cross_entropy(F.linear(hidden, weight), **call)
    named = {"class_weight" if name == "weight" else name: value for name, value in call.items()}
    with pytest.raises(error, match=f"^linear_cross_entropy: (class_)?{message}"):
        ops.linear_cross_entropy(hidden, weight, **named)


def test_a_head_that_does_not_fit_is_named() -> None:
    hidden, weight, _, labels = inputs()
    with pytest.raises(ValueError, match=r"^linear_cross_entropy: weight has shape \[50, 23\], expected \[V, 24\]"):
        ops.linear_cross_entropy(hidden, weight[:, 1:], labels)
    with pytest.raises(TypeError, match=r"^linear_cross_entropy: weight is torch.bfloat16, expected torch.float32"):
        ops.linear_cross_entropy(hidden, weight.bfloat16(), labels)


def test_a_second_derivative_is_refused_not_cut() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8)
    loss = ops.linear_cross_entropy(hidden, weight, torch.arange(4))
    with pytest.raises(RuntimeError, match="cannot be differentiated again; cross_entropy of the logits can"):
        torch.autograd.grad(loss, hidden, create_graph=True)
