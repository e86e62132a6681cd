from __future__ import annotations

from torch import Tensor

from llmkern import _native
from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES, refuse_few, refuse_strided
from llmkern.dispatch import implements
from llmkern.library import native

LEAST_TANH, MOST_EXACT = 4096, 8192
# Elements.  One thread, µs, native / PyTorch in fp32 and bf16: tanh, 1×1536 4.2/3.4 and 4.5/3.9, 1×4096 4.9/7.3 and
# 5.9/8.3, 512×1536 358/1341 and 481/1533.  Exact, where PyTorch calls oneDNN, both on AVX2: 1×1536 3.8/8.4 and 4.7/2.6,
# 32×1536 40.9/40.3 and 65.2/56.1, 512×1536 631/548 and 1013/886; on AVX-512, where the kernel has a table: 1×1536
# 2.9/8.2 and 3.4/8.1, 32×1536 11.5/24.9 and 20.2/25.6, 512×1536 290/348 and 307/312.
HAS_TABLE = (_native.cpu_isa() or "").startswith(("avx512", "amx"))


def refuse(x: Tensor, approximate: str) -> str | None:
    """What the kernels cannot take, on any device."""
    return refuse_strided(x=x)


def _refuse(x: Tensor, approximate: str) -> str | None:
    if approximate == "tanh":
        return refuse_few(LEAST_TANH, x=x) or refuse(x, approximate)
    if x.numel() > MOST_EXACT and not HAS_TABLE:
        return f"x has {x.numel()} elements; at most {MOST_EXACT} are taken exact: with more, oneDNN is faster"
    return refuse(x, approximate)


implements("gelu", CPU, dtypes=DTYPES, refuse=_refuse)(native("gelu"))
