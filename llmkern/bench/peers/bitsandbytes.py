"""bitsandbytes: LLM.int8() (arXiv:2208.07339)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmkern.bench.peer import Peer, Thunk, need

PEER = Peer("bitsandbytes", need("bitsandbytes", "bitsandbytes"))
OUTLIERS = 6.0  # activations beyond it stay in floating point


def _converted(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    bias = layer.bias is not None
    new = Linear8bitLt(layer.in_features, layer.out_features, bias=bias, has_fp16_weights=False, threshold=OUTLIERS)
    new.weight = Int8Params(layer.weight.detach().to("cpu", torch.float16), requires_grad=False, has_fp16_weights=False)
    if bias:
        new.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return new.to(layer.weight.device)


@PEER.op("int8_linear", approximate="its own int8 codes of the same weight, outliers in floating point")
def _int8_linear(call: dict[str, Any]) -> Thunk:
    from llmkern.bench.peers.pytorch import floating_linear

    layer, x = _converted(floating_linear(call)), call["x"]
    return lambda: layer(x)


def _convert_all(model: nn.Module, loaded: Any) -> nn.Module:
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and path != "lm_head":
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _converted(layer))
    return model


@PEER.variant("bitsandbytes-int8", int8=True, quick=False)
def _int8(spec: Any) -> Any:
    from llmkern.bench.variants import transformers_runner

    return transformers_runner(spec, change=_convert_all)
