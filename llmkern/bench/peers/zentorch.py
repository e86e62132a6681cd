"""zentorch: AMD's compile backend for its processors."""

from __future__ import annotations

from typing import Any

from llmkern.bench.peer import Peer, Unsupported, need

PEER = Peer("zentorch", need("zentorch", "zentorch"))


@PEER.variant("zentorch", dtypes=("bfloat16", "float32"), quick=False)
def _compiled(spec: Any) -> Any:
    import zentorch  # noqa: F401  (registers the backend)

    from llmkern.bench.variants import transformers_runner

    if spec.device.type != "cpu":
        raise Unsupported("zentorch is measured on cpu")
    return transformers_runner(spec, compiled="zentorch")
