"""llama.cpp through llama-cpp-python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from llmkern.bench.gguf_models import TYPES, file_of
from llmkern.bench.peer import Peer, Unsupported, need

PEER = Peer("llama.cpp", need("llama_cpp", "llama-cpp-python"))


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
    one = kind == "Q8_0"

    # Four bits say little of a model whose weights lie on such a grid, as the usual one's do.
    @PEER.variant(
        f"llama.cpp-{kind}", kinds=("causal",), dtypes=(), int8=one, quick=one, default=not kind.startswith("Q4")
    )
    def build(spec: Any) -> Any:
        return LlamaCppRunner(spec, file_of(spec, kind))


for _kind in TYPES:
    _register(_kind)
