"""CTranslate2: causal models and encoders, converted from a transformers checkpoint, in int8 and fp32."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from llmkern.bench.peer import Peer, Unsupported, need

PEER = Peer("ctranslate2", need("ctranslate2", "ctranslate2"))


def _model(spec: Any, load: str, compute: str) -> Any:
    """The model converted and loaded by ctranslate2's class of that name."""
    import ctranslate2

    from llmkern.bench.variants import loaded_model

    if spec.device.type != "cpu":
        raise Unsupported("CTranslate2 is measured on cpu")
    loaded = loaded_model(spec)
    if loaded.tokenizer is None:
        raise Unsupported("CTranslate2 converts models with their tokenizer: random weights have none")
    with tempfile.TemporaryDirectory() as folder:
        plain, converted = Path(folder) / "plain", Path(folder) / "converted"
        loaded.model.save_pretrained(plain)  # type: ignore[operator]
        loaded.tokenizer.save_pretrained(plain)
        ctranslate2.converters.TransformersConverter(str(plain)).convert(str(converted))
        model = getattr(ctranslate2, load)(
            str(converted), device="cpu", compute_type=compute, intra_threads=spec.threads, inter_threads=1
        )
    return model, loaded.tokenizer


class _CausalRunner:
    def __init__(self, spec: Any, compute: str) -> None:
        if spec.batch != 1:
            raise Unsupported("CTranslate2 is measured with one sequence of a causal model")
        self.spec = spec
        self.model, self.tokenizer = _model(spec, "Generator", compute)
        self.steps: Iterator[Any] = iter(())

    def prefill(self, ids: Tensor) -> None:
        tokens = self.tokenizer.convert_ids_to_tokens(ids[0].tolist())
        count = self.spec.new_tokens + 1
        self.steps = self.model.generate_tokens(tokens, max_length=count, sampling_topk=1, end_token=[])
        next(self.steps)

    def decode(self) -> None:
        next(self.steps)

    def logits(self, ids: Tensor) -> Tensor:
        found = self.model.forward_batch([self.tokenizer.convert_ids_to_tokens(ids.tolist())])
        return torch.from_numpy(numpy.asarray(found)[0].copy())

    def embed(self, ids: Tensor) -> Tensor:
        raise Unsupported("a Generator has no embeddings")


class _EncoderRunner:
    def __init__(self, spec: Any, compute: str) -> None:
        self.model, self.tokenizer = _model(spec, "Encoder", compute)

    def embed(self, ids: Tensor) -> Tensor:
        found = self.model.forward_batch(ids.tolist())
        hidden = torch.from_numpy(numpy.asarray(found.last_hidden_state))
        return nn.functional.normalize(hidden.mean(1), dim=-1)


def _register(name: str, compute: str) -> None:
    @PEER.variant(name, dtypes=(), int8=compute == "int8", quick=False)
    def build(spec: Any) -> Any:
        return (_CausalRunner if spec.kind == "causal" else _EncoderRunner)(spec, compute)


_register("ctranslate2-int8", "int8")
_register("ctranslate2-fp32", "float32")
