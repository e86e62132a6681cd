"""llmkern's own model variants: as the dispatcher chooses, quantized, and on each backend alone."""

from __future__ import annotations

from typing import Any

from llmkern import dispatch
from llmkern.bench.peer import Peer

__all__ = ["OURS"]

OURS = Peer("llmkern")


@OURS.variant("llmkern", dtypes=("float32", "bfloat16"))
def _optimized(spec: Any) -> Any:
    from llmkern.bench.variants import optimized_runner

    return optimized_runner(spec)


def _quantized(scheme: str, *, int8: bool, quick: bool) -> None:
    @OURS.variant(f"llmkern-{scheme}", dtypes=("float32", "bfloat16"), int8=int8, quick=quick)
    def quantized(spec: Any) -> Any:
        from llmkern.bench.variants import optimized_runner

        return optimized_runner(spec, scheme=scheme)


_quantized("int8", int8=True, quick=True)
_quantized("int8-block", int8=True, quick=False)
_quantized("int4", int8=False, quick=False)


def _register(backend: str) -> None:
    @OURS.variant(f"llmkern:{backend}", default=False)
    def forced(spec: Any) -> Any:
        from llmkern.bench.variants import optimized_runner

        return optimized_runner(spec, backend=backend)


for _backend in dispatch.backends():
    if _backend.name != "reference":
        _register(_backend.name)
