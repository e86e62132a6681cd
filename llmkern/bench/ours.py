"""llmkern's own model variants: chosen by the dispatcher, quantized, on a GGUF file's blocks, on each backend alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmkern import dispatch
from llmkern.bench.peer import Peer

__all__ = ["OURS"]

OURS = Peer("llmkern")


@OURS.variant("llmkern", kinds=("causal", "encoder", "training"), dtypes=("float32", "bfloat16"))
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


def _of_file(kind: str) -> None:
    @OURS.variant(f"llmkern-gguf-{kind}", kinds=("causal",), int8=kind == "Q8_0", quick=False, default=kind == "Q8_0")
    def of_file(spec: Any) -> Any:
        from llmkern.bench.gguf_models import file_of
        from llmkern.bench.variants import optimized_runner

        return optimized_runner(replace(spec, model=str(file_of(spec, kind))), packed=True)


for _kind in ("Q8_0", "Q4_0", "Q4_K_M"):
    _of_file(_kind)


def _register(backend: str) -> None:
    @OURS.variant(f"llmkern:{backend}", default=False)
    def forced(spec: Any) -> Any:
        from llmkern.bench.variants import optimized_runner

        return optimized_runner(spec, backend=backend)


for _backend in dispatch.backends():
    if _backend.name != "reference":
        _register(_backend.name)
