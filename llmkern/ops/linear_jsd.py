"""Distance of a student's output head from its teacher's: the generalized Jensen-Shannon divergence."""

from __future__ import annotations

from torch import Tensor

from llmkern.checks import check_non_negative
from llmkern.ops._divergence import ARGUMENTS, HINT, Teacher, run_divergence
from llmkern.ops._linear_loss import LinearJsd, define_linear_loss

__all__ = ["linear_jsd"]

_OP = "linear_jsd"


def linear_jsd(
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
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    hidden_grad: bool | None = None,
    weight_grad: bool | None = None,
) -> Tensor:
    """`T² · (β · KL(teacher ‖ m) + (1 − β) · KL(student ‖ m))` with m = β · teacher + (1 − β) · student, in chunks.

    Agarwal et al. 2023 (arXiv:2306.13649), equation 1, of the softmax of both heads' logits over T.  It is bounded
    where one of the two gives a word no probability.

    beta: 0 to 1; at the ends, where the formula is 0, it is what the formula divided by β or 1 − β tends to: at 0
        KL(teacher ‖ student), at 1 KL(student ‖ teacher), as `linear_kl_div` computes them.
    The other arguments, the result and the errors are those of `linear_kl_div`; teacher_words may be given for any beta
    below 1.
    """
    check_non_negative(_OP, "beta", beta)
    if beta > 1:
        raise ValueError(f"{_OP}: beta is {beta}, expected a number from 0 to 1")
    if beta == 1 and teacher_words is not None:
        raise ValueError(f"{_OP}: beta is {beta} beside teacher_words, expected the teacher's logits of all words")
    teacher = Teacher(teacher_hidden, teacher_weight, teacher_bias, teacher_logits, teacher_words)
    rows = (labels, scale, ignore_index, temperature, reduction, num_items, hidden_grad, weight_grad)
    return run_divergence(_OP, {"beta": beta}, (hidden, weight, bias), teacher, *rows)


define_linear_loss(_OP, ARGUMENTS.format(side="float beta"), LinearJsd, HINT)
