"""Cross-entropy of logits and labels, with label smoothing, z-loss and softcap."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from llmkern.checks import check_floating, check_has_hidden, shape_text
from llmkern.dispatch import dispatch
from llmkern.library import define
from llmkern.ops._loss import LossOptions, check_labels, check_loss, loss_dtype, row_scale, wide_weight

__all__ = ["cross_entropy"]


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """`-log softmax(logits)[label]`, computed in fp32, in one pass over each row's memory.

    logits: [..., V], fp32, bf16, fp16 or fp64, any strides.  labels: int64, logits' shape without V.
    weight: [V], a factor of each word's loss, as in torch.nn.functional.cross_entropy; it has no gradient.
    ignore_index: rows with this label have the loss 0 and are not counted.
    label_smoothing: the share of the target that all words have alike, 0 to 1.
    z_loss: adds `z_loss · logsumexp²` to each row (PaLM, Chowdhery et al. 2022, arXiv:2204.02311).
    softcap: logits are `softcap · tanh(logits / softcap)` first (Gemma 2); 0 for none.
    reduction: "mean" (over the labels' weights that are not ignored), "sum" or "none".
    num_items: what "mean" divides by instead, as transformers' num_items_in_batch under gradient accumulation.
    Returns the loss in fp32 (fp64 for fp64): a number, or labels' shape for "none".  Where all labels are ignored the
    mean is 0, and so are the gradients.  Differentiable in logits.
    Raises TypeError for other dtypes, ValueError for other shapes, devices or values, on the CPU also for labels out
    of range; on other devices such a label makes the loss NaN.
    """
    check_floating("cross_entropy", logits=logits)
    check_has_hidden("cross_entropy", "logits", logits)
    rows, targets = logits.reshape(-1, logits.shape[-1]) if logits.numel() else logits.flatten(0, -2), labels
    if isinstance(labels, Tensor):
        if labels.shape != logits.shape[:-1]:
            expected = f"{shape_text(logits.shape[:-1])} (the shape of logits without its last dimension)"
            raise ValueError(f"cross_entropy: labels has shape {shape_text(labels.shape)}, expected {expected}")
        targets = labels.reshape(-1)
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    check_loss("cross_entropy", "logits", rows, rows.shape[1], targets, weight, options)
    check_labels("cross_entropy", targets, rows.shape[1], ignore_index)
    weight = wide_weight(weight, rows)
    scale = row_scale("cross_entropy", reduction, targets, weight, ignore_index, num_items, loss_dtype(rows))
    loss, _ = dispatch(
        "cross_entropy",
        logits=rows,
        labels=targets,
        weight=weight,
        **options._asdict(),
        reduction="none" if reduction == "none" else "sum",
    )
    return loss.view(labels.shape) if reduction == "none" else loss * scale


class _CrossEntropy(NamedTuple):
    """Arguments of the op, in the order of its schema."""

    logits: Tensor
    labels: Tensor
    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    reduction: str


def _fake(*args: Any, **named: Any) -> tuple[Tensor, Tensor]:
    call = _CrossEntropy(*args, **named)
    rows, dtype = call.logits.shape[:1], loss_dtype(call.logits)
    return call.logits.new_empty(() if call.reduction == "sum" else rows, dtype=dtype), call.logits.new_empty(
        rows, dtype=dtype
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, weight, *ctx.options, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, labels, weight, output[1])


def _backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    logits, labels, weight, lse = ctx.saved_tensors
    dlogits = dispatch(
        "cross_entropy_backward",
        logits=logits,
        dloss=dloss.expand(labels.shape),
        labels=labels,
        weight=weight,
        lse=lse,
        **LossOptions(*ctx.options)._asdict(),
    )
    return dlogits, *[None] * 7


def _fake_backward(logits: Tensor, *_: Any, **__: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_in_place(logits: Tensor, *_: Any, **__: Any) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=loss_dtype(logits))


# logits [N, V], labels [N] in int64, weight [V] in the dtype of the loss.  The loss is that of each row, or with
# reduction "sum" their sum; each row's log-sum-exp is 0 where it is ignored.
define(
    "cross_entropy(Tensor logits, Tensor labels, Tensor? weight, int ignore_index, float label_smoothing, float z_loss,"
    " float softcap, str reduction) -> (Tensor loss, Tensor lse)",
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
define(
    "cross_entropy_backward(Tensor logits, Tensor dloss, Tensor labels, Tensor? weight, Tensor lse, int ignore_index,"
    " float label_smoothing, float z_loss, float softcap) -> Tensor",
    fake=_fake_backward,
)
# Returns the losses and overwrites the logits with their gradients times `scale` [N], for a loss over chunks.
define(
    "cross_entropy_in_place_backward(Tensor(a!) logits, Tensor labels, Tensor? weight, Tensor scale, int ignore_index,"
    " float label_smoothing, float z_loss, float softcap) -> Tensor",
    fake=_fake_in_place,
)
