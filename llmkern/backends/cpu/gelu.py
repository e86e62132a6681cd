from __future__ import annotations

from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES, refuse_strided
from llmkern.backends.cpu._speed import MeasuredSizes
from llmkern.dispatch import implements
from llmkern.library import native


def refuse(x: Tensor, approximate: str) -> str | None:
    """Return why the kernels cannot take the call on any device, or None."""
    return refuse_strided(x=x)


def refuse_backward(dy: Tensor, x: Tensor, approximate: str) -> str | None:
    """Return why the kernels of the gradient cannot take the call on any device, or None."""
    return refuse_strided(dy=dy, x=x)


SIZES = MeasuredSizes("gelu", "x", variant="approximate", variants=("none", "tanh"))

implements("gelu", CPU, dtypes=DTYPES, refuse=refuse, slower=SIZES, has_backward=True, rows_alone="always")(
    native("gelu")
)
implements("gelu_backward", CPU, dtypes=DTYPES, refuse=refuse_backward, rows_alone="always")(native("gelu_backward"))
