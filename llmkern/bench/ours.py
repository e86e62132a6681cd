"""llmkern's own model variants: as the dispatcher chooses, in int8, and on each backend alone."""

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


@OURS.variant("llmkern-int8", dtypes=("float32", "bfloat16"), int8=True)
def _int8(spec: Any) -> Any:
    from llmkern.bench.variants import optimized_runner

    return optimized_runner(spec, int8=True)


def _register(backend: str) -> None:
    @OURS.variant(f"llmkern:{backend}", default=False)
    def forced(spec: Any) -> Any:
        from llmkern.bench.variants import optimized_runner

        return optimized_runner(spec, backend=backend)


for _backend in dispatch.backends():
    if _backend.name != "reference":
        _register(_backend.name)
