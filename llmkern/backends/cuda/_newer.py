"""Calls that Triton serves better on GPUs whose tensor cores only wgmma (9.x) or tcgen05 (10.x, 11.x) fills.

The CUDA kernels are written in mma.sync, which reaches some 62% of what wgmma does on an H100; Triton compiles its own
to wgmma and tcgen05.  12.x has neither, and there mma.sync is all there is.  benchmarks/results/PREDICTIONS.md has what
was expected of both; a measurement on such a GPU replaces it.
"""

from __future__ import annotations

from torch import Tensor

from llmkern.checks import row_count
from llmkern.dispatch import GivesWay, known

__all__ = ["WARPGROUP_ATTENTION", "many_rows"]

SINCE, BEFORE = (9, 0), (12, 0)
FEW_QUERIES = 64
"""Up to so many, attention is bound by reading keys and values, not by the tensor cores."""
FEW_ROWS = 64
"""Up to so many, a product is bound by reading the weights."""


def _because(kernel: str) -> str:
    return f"Triton's {kernel} uses the tensor cores of compute capability 9.0 and later, which mma.sync does not fill"


def _many_queries(q: Tensor, **_: object) -> bool:
    return known(q.shape[2] > FEW_QUERIES)


WARPGROUP_ATTENTION = GivesWay("triton", SINCE, BEFORE, _many_queries, _because("attention"))


def many_rows(lead: str) -> GivesWay:
    """Return the rule for a product whose first operand is the argument `lead`."""

    def when(**call: object) -> bool:
        rows = call[lead]
        assert isinstance(rows, Tensor)
        return known(row_count(rows) > FEW_ROWS)

    return GivesWay("triton", SINCE, BEFORE, when, _because("product"))
