"""llama.cpp as xllamacpp's wheel has it: built for AVX2, whatever the machine; `llama.cpp` is built for the machine."""

from __future__ import annotations

import queue
import threading
from typing import Any

from torch import Tensor

from llmkern.bench.gguf_models import file_of
from llmkern.bench.peer import Peer, Unsupported, need

PEER = Peer("xllamacpp", need("xllamacpp", "xllamacpp"))


class _Runner:
    """One sequence, by the wheel's server, which streams tokens from a thread of its own."""

    def __init__(self, spec: Any) -> None:
        if spec.batch != 1 or spec.kind != "causal" or spec.device.type != "cpu":
            raise Unsupported("xllamacpp is measured on cpu, with one sequence of a causal model")
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file_of(spec, "Q8_0"))
        params.n_ctx, params.n_batch, params.n_parallel = max(spec.capacity + 1, 512), 512, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = spec.threads
        self.spec, self.server = spec, xllamacpp.Server(params)
        self.tokens: queue.Queue[Any] = queue.Queue()
        self.thread: threading.Thread | None = None

    def prefill(self, ids: Tensor) -> None:
        if self.thread is not None:
            self.thread.join()
        tokens: queue.Queue[Any] = queue.Queue()
        self.tokens = tokens
        prompt = {"prompt": ids[0].tolist(), "n_predict": self.spec.new_tokens + 1, "temperature": 0.0}
        request = prompt | {"cache_prompt": False, "ignore_eos": True, "stream": True}
        self.thread = threading.Thread(target=self.server.handle_completions, args=(request, tokens.put))
        self.thread.start()
        self.decode()

    def decode(self) -> None:
        self.tokens.get()

    def logits(self, ids: Tensor) -> Tensor:
        raise Unsupported("its server gives out no logits; llama.cpp-Q8_0 computes the same")

    def embed(self, ids: Tensor) -> Tensor:
        raise Unsupported("xllamacpp is measured on causal models")


@PEER.variant("xllamacpp-Q8_0-avx2", kinds=("causal",), dtypes=(), int8=True, quick=False)
def _q8_0(spec: Any) -> Any:
    return _Runner(spec)
