"""torchao (PyTorch's own library of quantization)."""

from __future__ import annotations

from typing import Any

from torch import nn

from llmkern.bench.peer import Peer, Thunk, need

PEER = Peer("torchao", need("torchao", "torchao"))


def _config(name: str) -> Any:
    import torchao.quantization

    return getattr(torchao.quantization, name)()


def _quantized(model: nn.Module, config: str) -> nn.Module:
    from torchao.quantization import quantize_

    quantize_(model, _config(config))
    return model


@PEER.op("int8_linear", provider="torchao", approximate="its own int8 codes of the same weight, one scale per token")
def _int8_linear(call: dict[str, Any]) -> Thunk:
    from llmkern.bench.peers.pytorch import floating_linear

    layer, x = _quantized(nn.Sequential(floating_linear(call)), "Int8DynamicActivationInt8WeightConfig"), call["x"]
    return lambda: layer(x)


def _model(spec: Any, config: str) -> Any:
    from llmkern.bench.variants import transformers_runner

    return transformers_runner(spec, change=lambda model, loaded: _quantized(model, config))


@PEER.variant("torchao-int8", int8=True)
def _int8(spec: Any) -> Any:
    """int8 weights, activations quantized per token."""
    return _model(spec, "Int8DynamicActivationInt8WeightConfig")


@PEER.variant("torchao-int8-weight-only", int8=True, quick=False)
def _weight_only(spec: Any) -> Any:
    return _model(spec, "Int8WeightOnlyConfig")
