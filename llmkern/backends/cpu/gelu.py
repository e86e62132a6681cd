from __future__ import annotations

from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES, refuse_few, refuse_strided
from llmkern.dispatch import implements
from llmkern.library import native

LEAST_TANH, MOST_EXACT = 4096, 8192
# Elements.  One thread, µs, native / PyTorch in fp32 and bf16: tanh, 1×1536 4.2/3.4 and 4.5/3.9, 1×4096 4.9/7.3 and
# 5.9/8.3, 512×1536 358/1341 and 481/1533.  Exact, where PyTorch calls oneDNN: 1×1536 4.3/7.7 and 4.6/7.8, 32×1536
# 19.6/19.8 and 34.3/25.2, 512×1536 351/296 and 466/285.


def refuse(x: Tensor, approximate: str) -> str | None:
    """What the kernels cannot take, on any device."""
    return refuse_strided(x=x)


def _refuse(x: Tensor, approximate: str) -> str | None:
    if approximate == "tanh":
        return refuse_few(LEAST_TANH, x=x) or refuse(x, approximate)
    if x.numel() > MOST_EXACT:
        return f"x has {x.numel()} elements; at most {MOST_EXACT} are taken exact: with more, oneDNN is faster"
    return refuse(x, approximate)


implements("gelu", CPU, dtypes=DTYPES, refuse=_refuse)(native("gelu"))
