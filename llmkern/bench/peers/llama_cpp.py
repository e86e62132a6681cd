"""llama.cpp through llama-cpp-python."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from llmkern.bench.peer import Peer, Unsupported, need
from llmkern.config import settings

PEER = Peer("llama.cpp", need("llama_cpp", "llama-cpp-python"))
TYPES = {"F32": "LLAMA_FTYPE_ALL_F32", "BF16": "LLAMA_FTYPE_MOSTLY_BF16", "Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0"}


def file_of(spec: Any, kind: str) -> Path:
    """The model's GGUF in this type, converted from the file that there is and kept in the cache folder."""
    import llama_cpp

    from llmkern.testing.real_models import smollm2_file

    if spec.model == "demo:smollm2":
        source = smollm2_file()
    elif spec.model is not None and spec.model.endswith(".gguf"):
        source = Path(spec.model)
    else:
        raise Unsupported("llama.cpp reads GGUF files: give MODEL as one")
    target = Path(settings.cache).expanduser() / f"{source.stem}-llama.cpp-{kind}.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_suffix(f".{os.getpid()}")
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize = getattr(llama_cpp, TYPES[kind]), True
        options.nthread = spec.threads
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(scratch).encode(), ctypes.byref(options))
        if status != 0:
            raise RuntimeError(f"llama_model_quantize to {kind} ended with status {status}")
        scratch.replace(target)
    return target


class LlamaCppRunner:
    """One sequence.  Logits of every position need a context of their own, which is gone when speed is measured."""

    def __init__(self, spec: Any, path: Path) -> None:
        if spec.batch != 1 or spec.kind != "causal" or spec.device.type != "cpu":
            raise Unsupported("llama.cpp is measured on cpu, with one sequence of a causal model")
        self.spec, self.path = spec, path
        self._open: Any = None
        self._all = False
        self._next = 0

    def _llama(self, *, every_position: bool) -> Any:
        import llama_cpp

        if self._open is None or self._all != every_position:
            if self._open is not None:
                self._open.close()
            self._all = every_position
            self._open = llama_cpp.Llama(
                str(self.path),
                n_ctx=max(self.spec.capacity, 512),
                n_batch=512,
                n_threads=self.spec.threads,
                n_threads_batch=self.spec.threads,
                logits_all=every_position,
                verbose=False,
            )
        return self._open

    def prefill(self, ids: Tensor) -> None:
        llama = self._llama(every_position=False)
        llama.reset()
        self._eval(llama, ids[0].tolist())

    def decode(self) -> None:
        self._eval(self._open, [self._next])

    def _eval(self, llama: Any, ids: list[int]) -> None:
        import llama_cpp

        llama.eval(ids)
        last = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        self._next = int(numpy.ctypeslib.as_array(last, (llama.n_vocab(),)).argmax())

    def logits(self, ids: Tensor) -> Tensor:
        llama = self._llama(every_position=True)
        llama.reset()
        llama.eval(ids.tolist())
        return torch.from_numpy(llama.scores[: len(ids)].copy())

    def embed(self, ids: Tensor) -> Tensor:
        raise Unsupported("llama.cpp is measured on causal models")


def _register(kind: str) -> None:
    @PEER.variant(f"llama.cpp-{kind}", kinds=("causal",), dtypes=(), int8=kind == "Q8_0", quick=kind == "Q8_0")
    def build(spec: Any) -> Any:
        return LlamaCppRunner(spec, file_of(spec, kind))


for _kind in TYPES:
    _register(_kind)
