"""PyTorch: its operators, each implementation of its attention by name, its compiler, its dynamic quantization."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llmkern import dispatch
from llmkern.bench.peer import Peer, Thunk, Unsupported
from llmkern.bench.sweep import ops_with_sweeps

PEER = Peer("torch")

# Where a compiler gains: what PyTorch composes of several passes over memory.
COMPILED = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "swiglu", "rope", "quantize_int8")
_SDPA = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}


def _operator(op: str, call: dict[str, Any]) -> Any:
    """Return the function that llmkern's `torch` backend runs for this op."""
    impl = dispatch.implementation(op, "torch")
    if reason := impl.why_not(**call):
        raise Unsupported(reason)
    return impl.fn


def _register(op: str) -> None:
    @PEER.op(op)
    def eager(call: dict[str, Any]) -> Thunk:
        fn = _operator(op, call)
        return lambda: fn(**call)

    if op in COMPILED:

        @PEER.op(op, provider="torch-compile")
        def compiled(call: dict[str, Any]) -> Thunk:
            fn = torch.compile(_operator(op, call), dynamic=False)
            return lambda: fn(**call)


for _op in ops_with_sweeps():
    _register(_op)


def _sdpa(name: str) -> None:
    @PEER.op("attention", provider=f"sdpa-{name}")
    def attention(call: dict[str, Any]) -> Thunk:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = call["q"], call["k"], call["v"]
        backend, grouped = getattr(SDPBackend, _SDPA[name]), q.shape[1] != k.shape[1]

        def run() -> Any:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q, k, v, is_causal=call["causal"], scale=call["sm_scale"], enable_gqa=grouped
                )

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # says for every other implementation why it is not taken
                run()
        except RuntimeError as error:
            raise Unsupported(str(error).split("\n")[0]) from None
        return run


for _name in _SDPA:
    _sdpa(_name)


def floating_linear(call: dict[str, Any]) -> nn.Linear:
    """The layer that int8_linear stands for, its weight in x's dtype."""
    n, k = call["w_q"].shape
    if call["activation"] != "none":
        raise Unsupported("without an activation only")
    layer = nn.Linear(k, n, bias=call["bias"] is not None, device=call["x"].device, dtype=call["x"].dtype)
    with torch.no_grad():
        layer.weight.copy_(call["w_q"] * call["w_scale"])
        if call["bias"] is not None:
            layer.bias.copy_(call["bias"])
    return layer.requires_grad_(False)


@PEER.op("int8_linear", provider="torch-linear", approximate="weight and activations in floating point")
def _linear(call: dict[str, Any]) -> Thunk:
    layer, x = floating_linear(call), call["x"]
    return lambda: layer(x)


@PEER.op("int8_linear", provider="quantize_dynamic", approximate="int8, one scale for all activations")
def _quantize_dynamic(call: dict[str, Any]) -> Thunk:
    if call["x"].device.type != "cpu" or call["x"].dtype != torch.float32:
        raise Unsupported("runs on cpu in float32 only")
    return _dynamic(nn.Sequential(floating_linear(call)), call["x"])


def _dynamic(layer: nn.Module, x: torch.Tensor) -> Thunk:
    quantized = quantize_dynamic(layer)
    return lambda: quantized(x)


def quantize_dynamic(model: nn.Module) -> nn.Module:
    """Linear layers in int8 by PyTorch's own means, which it calls deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@PEER.variant("sdpa", kinds=("causal", "encoder", "training"), dtypes=("float32", "bfloat16"))
def _scaled_dot_product(spec: Any) -> Any:
    """transformers as it comes: the untouched model that all others are compared with."""
    from llmkern.bench.variants import transformers_runner

    return transformers_runner(spec)


@PEER.variant("eager", quick=False)
def _eager(spec: Any) -> Any:
    """transformers' attention in plain operators."""
    from llmkern.bench.variants import transformers_runner

    return transformers_runner(spec, attention="eager")


@PEER.variant("compile", kinds=("causal", "encoder", "training"), dtypes=("bfloat16",), default=False)
def _compiled(spec: Any) -> Any:
    """torch.compile; but for training with the weights frozen, and a static cache."""
    from llmkern.bench.variants import transformers_runner

    torch._inductor.config.freezing = spec.kind != "training"
    return transformers_runner(spec, compiled="inductor")


@PEER.variant("quantize_dynamic", int8=True)
def _dynamic_model(spec: Any) -> Any:
    from llmkern.bench.variants import transformers_runner

    if spec.dtype != torch.float32 or spec.device.type != "cpu":
        raise Unsupported("quantize_dynamic runs on cpu in float32 only")
    return transformers_runner(spec, change=lambda model, loaded: quantize_dynamic(model))
