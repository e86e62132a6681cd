"""Distance of a student's output head from its teacher's: the Kullback-Leibler divergence of their next tokens."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

from torch import Tensor

from llmkern.checks import check_flag
from llmkern.ops._divergence import ARGUMENTS, HINT, Teacher, run_divergence
from llmkern.ops._linear_loss import LinearJsd, define_linear_loss

__all__ = ["linear_kl_div"]

_OP = "linear_kl_div"


def linear_kl_div(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    teacher_logits: Tensor | None = None,
    teacher_words: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    labels: Tensor | None = None,
    scale: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    reverse: bool = False,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    hidden_grad: bool | None = None,
    weight_grad: bool | None = None,
) -> Tensor:
    """`T² · KL(teacher ‖ student)` of the softmax of both heads' logits over T, a chunk of rows at a time.

    Hinton et al. 2015 (arXiv:1503.02531): T² keeps the gradients' size whatever the temperature.  The student's logits
    are never in memory all at once, nor are the teacher's where its hidden states are given.

    hidden: [..., H], fp32, bf16, fp16 or fp64, any strides.  weight: [V, H] and bias: [V], in hidden's dtype.
    teacher_hidden: hidden's shape but for the last dimension, G.  teacher_weight: [V, G] and teacher_bias: [V]; a
        floating dtype of their own.
    teacher_logits: in place of these three, logits that were computed before: hidden's shape but for the last
        dimension, V; or K logits of the words that teacher_words (int64, the same shape) names, beside which the
        teacher gives no word a probability; of a word that is named twice the larger one counts.
    The teacher is frozen: what requires a gradient is refused.
    labels: int64, hidden's shape without H; rows whose label is ignore_index are left out.  None: all rows count.
    scale: a factor of each row's divergence; labels' shape, in the dtype of the loss, no gradient; 0 leaves a row out.
    temperature: T, above 0.  reverse: KL(student ‖ teacher), which prefers what the teacher is sure of; it is infinite
        for words that teacher_words leaves out, and refused with it.
    reduction: "mean" over the rows that count, or over `num_items`; "sum"; "none" for each row's, 0 where left out.
    hidden_grad, weight_grad: as in `linear_cross_entropy`.
    Under autocast both heads' tensors are cast as those of a linear layer.
    Returns the divergence in fp32 (fp64 for fp64).  A word whose probability is 0 on the left adds 0.  Differentiable,
    once, in hidden, weight and bias.
    Raises TypeError for other dtypes, ValueError for other shapes, devices or values.
    """
    check_flag(_OP, reverse=reverse)
    if reverse and teacher_words is not None:
        raise ValueError(f"{_OP}: reverse is True beside teacher_words, expected the teacher's logits of all words")
    teacher = Teacher(teacher_hidden, teacher_weight, teacher_bias, teacher_logits, teacher_words)
    rows = (labels, scale, ignore_index, temperature, reduction, num_items, hidden_grad, weight_grad)
    return run_divergence(_OP, {"reverse": reverse}, (hidden, weight, bias), teacher, *rows)


_FIELDS = ["reverse" if field == "beta" else field for field in LinearJsd._fields]
_LinearKlDiv: Any = namedtuple("_LinearKlDiv", _FIELDS)  # type: ignore[misc]
define_linear_loss(_OP, ARGUMENTS.format(side="bool reverse"), _LinearKlDiv, HINT)
