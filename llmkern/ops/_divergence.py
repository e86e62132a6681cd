"""Checks and call of the divergences of a student's output head from its teacher's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from llmkern.checks import (
    check_dtype,
    check_finite,
    check_floating,
    check_has_hidden,
    check_same_device,
    check_same_dtype,
    check_shape,
    given,
    shape_text,
)
from llmkern.ops._linear_loss import as_rows, run_linear_loss, under_autocast
from llmkern.ops._loss import loss_dtype, row_scale

__all__ = ["ARGUMENTS", "HINT", "Teacher", "run_divergence"]

ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias,"
    " Tensor? teacher_logits, Tensor? teacher_words, Tensor scale, {side}, float temperature, str reduction,"
    " bool hidden_grad, bool weight_grad"
)
"""Arguments of the schemas, without the one that says which divergence it is."""
HINT = "that of the divergence of the logits can"


class Teacher(NamedTuple):
    """The teacher's side of a call: its head's inputs, or its logits."""

    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_logits: Tensor | None
    teacher_words: Tensor | None


def run_divergence(
    op: str,
    side: dict[str, Any],
    head: tuple[Tensor, Tensor, Tensor | None],
    teacher: Teacher,
    labels: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    temperature: float,
    reduction: str,
    num_items: float | Tensor | None,
    hidden_grad: bool | None,
    weight_grad: bool | None,
) -> Tensor:
    """Check the arguments of a public function and dispatch it.

    side: the op's own argument, checked.  head: hidden, weight, bias.
    """
    check_finite(op, "temperature", temperature)
    if temperature <= 0:
        raise ValueError(f"{op}: temperature is {temperature}, expected a finite number above 0")
    hidden, weight, bias = head
    check_floating(op, hidden=hidden, weight=weight, **given(bias=bias))
    check_has_hidden(op, "hidden", hidden)
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    check_same_dtype(op, "hidden", hidden, weight=weight, bias=bias)
    check_same_device(op, "hidden", hidden, weight=weight, bias=bias)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"{op}: weight has shape {shape_text(weight.shape)}, expected [V, {hidden.shape[-1]}]")
    words = weight.shape[0]
    if words == 0:
        raise ValueError(f"{op}: there are 0 words to choose from, expected at least 1")
    check_shape(op, "bias", bias, (words,), "one number for each word")
    checked = _checked(op, hidden, words, *teacher)
    if labels is None:
        labels = hidden.new_zeros(hidden.shape[:-1], dtype=torch.int64)
    check_dtype(op, "labels", labels, torch.int64)
    check_shape(op, "labels", labels, hidden.shape[:-1], "the shape of hidden without its last dimension")
    if scale is not None:
        check_floating(op, scale=scale)
    check_shape(op, "scale", scale, labels.shape, "the shape of labels")
    check_same_device(op, "hidden", hidden, labels=labels, scale=scale)
    targets = labels.reshape(-1)
    factor = row_scale(op, reduction, targets, None, ignore_index, num_items, loss_dtype(hidden))
    factor = factor.expand(targets.shape).masked_fill(targets == ignore_index, 0)
    factor = factor if scale is None else scale.detach().reshape(-1) * factor
    return run_linear_loss(
        op,
        labels.shape,
        reduction,
        hidden_grad,
        weight_grad,
        hidden=as_rows(hidden),
        weight=weight,
        bias=bias,
        **checked,
        scale=factor,
        **side,
        temperature=temperature,
    )


def _checked(
    op: str,
    hidden: Tensor,
    words: int,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_logits: Tensor | None,
    teacher_words: Tensor | None,
) -> dict[str, Tensor | None]:
    """Return the teacher's arguments in rows, or raise where they do not fit."""
    head = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight, "teacher_bias": teacher_bias}
    rows = hidden.shape[:-1]
    if teacher_logits is None:
        if teacher_hidden is None or teacher_weight is None:
            missing = "teacher_hidden" if teacher_hidden is None else "teacher_weight"
            raise TypeError(f"{op}: {missing} is None, expected a tensor, or teacher_logits in place of the head")
        if teacher_words is not None:
            raise ValueError(f"{op}: teacher_words is given without teacher_logits, expected both")
        check_floating(
            op, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight, **given(teacher_bias=teacher_bias)
        )
        check_has_hidden(op, "teacher_hidden", teacher_hidden)
        teacher_hidden, teacher_weight, teacher_bias = under_autocast(teacher_hidden, teacher_weight, teacher_bias)
        assert teacher_hidden is not None
        others = {"teacher_weight": teacher_weight, "teacher_bias": teacher_bias}
        check_same_dtype(op, "teacher_hidden", teacher_hidden, **others)
        if teacher_hidden.shape[:-1] != rows:
            expected = f"[{', '.join(map(str, rows))}, G], the rows of hidden"
            raise ValueError(f"{op}: teacher_hidden has shape {shape_text(teacher_hidden.shape)}, expected {expected}")
        head = {"teacher_hidden": teacher_hidden, **others}
        expected_shape = (words, teacher_hidden.shape[-1])
        check_shape(op, "teacher_weight", teacher_weight, expected_shape, "the student's words, the teacher's size")
        check_shape(op, "teacher_bias", teacher_bias, (words,), "one number for each word")
    else:
        check_floating(op, teacher_logits=teacher_logits)
        if beside := [name for name, tensor in head.items() if tensor is not None]:
            raise ValueError(f"{op}: {beside[0]} is given beside teacher_logits, expected one of them")
        _check_logits(op, teacher_logits, teacher_words, (*rows, words))
    found = {**head, "teacher_logits": teacher_logits, "teacher_words": teacher_words}
    check_same_device(op, "hidden", hidden, **found)
    for name, tensor in found.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{op}: {name} requires a gradient, expected a frozen teacher's")
    in_rows = ("teacher_hidden", "teacher_logits", "teacher_words")
    return {name: as_rows(t) if name in in_rows and t is not None else t for name, t in found.items()}


def _check_logits(op: str, logits: Tensor, which: Tensor | None, shape: tuple[int, ...]) -> None:
    """Check [..., V] logits, or [..., K] of the words `which`; shape: that of all logits."""
    if which is None:
        check_shape(op, "teacher_logits", logits, shape, "a logit for each word")
        return
    check_dtype(op, "teacher_words", which, torch.int64)
    if logits.shape[:-1] != shape[:-1] or logits.dim() != len(shape) or logits.shape[-1] == 0:
        expected = f"[{', '.join(map(str, shape[:-1]))}, K], the rows of hidden"
        raise ValueError(f"{op}: teacher_logits has shape {shape_text(logits.shape)}, expected {expected}")
    check_shape(op, "teacher_words", which, logits.shape, "the shape of teacher_logits")
    # Only on the CPU, as for labels; elsewhere a word out of range is an error of the device.
    if which.is_cpu and not is_compiling() and type(which) is Tensor:
        wrong = (which < 0) | (which >= shape[-1])
        if bool(wrong.any()):
            raise ValueError(f"{op}: teacher_words has {int(which[wrong][0])}, expected 0 to {shape[-1] - 1}")
