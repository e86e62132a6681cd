"""Liger-Kernel: Triton kernels for training.  Without a GPU they run in Triton's interpreter, for correctness only."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

from llmkern.bench.peer import Peer, Thunk, Unsupported, need


def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Liger-Kernel needs Triton, which is not installed: pip install triton"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "Liger-Kernel needs a GPU; TRITON_INTERPRET=1 checks it without one, and gives no times"
    return need("liger_kernel", "liger-kernel")()


PEER = Peer("liger", _missing)


class _Number(float):
    """A kernel's number: compiled kernels find `to` on it, and Triton's interpreter hands on what it was given."""

    def to(self, dtype: Any) -> _Number:
        return self


def _on_gpu() -> bool:
    return torch.cuda.is_available()


def _number(value: float) -> float:
    return value if _on_gpu() else _Number(value)


def _interpretable(module: Any) -> None:
    """The interpreter has nothing for CUDA's own rsqrt, which the kernels of this module import by name."""
    if not _on_gpu():
        import triton

        module.rsqrt = lambda x: triton.language.rsqrt(x)  # looked up late: it is replaced while a kernel runs


def _compiled_only() -> None:
    if not _on_gpu():
        raise Unsupported("Triton's interpreter cannot run this kernel: it asks plain numbers for their dtype")


def _plain(call: dict[str, Any], *absent: str) -> None:
    for name in absent:
        if call.get(name) is not None:
            raise Unsupported(f"without {name} only")


@PEER.variant("liger", kinds=("training",), dtypes=("float32", "bfloat16"))
def _model(spec: Any) -> Any:
    """Its kernels in the model's instance, as its documentation does it; on a GPU only."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    from llmkern.bench.variants import transformers_runner

    def change(model: Any, loaded: Any) -> Any:
        _apply_liger_kernel_to_instance(model=model)
        return model

    return transformers_runner(spec, change=change)


@PEER.op("rms_norm", timed=_on_gpu)
def _rms_norm(call: dict[str, Any]) -> Thunk:
    from liger_kernel.ops import rms_norm as module

    _interpretable(module)
    _plain(call, "bias")
    x, weight, offset = call["x"], call["weight"], call["weight_offset"]
    # Rounds before the weight as Llama's own does; in fp32 from end to end as Gemma's, where the weight has an offset.
    casting = "gemma" if offset else "llama"
    return lambda: module.LigerRMSNormFunction.apply(x, weight, _number(call["eps"]), _number(offset), casting, False)


@PEER.op("layer_norm", timed=_on_gpu)
def _layer_norm(call: dict[str, Any]) -> Thunk:
    from liger_kernel.ops import layer_norm as module

    _interpretable(module)
    x, weight = call["x"], call["weight"]
    bias = torch.zeros_like(weight) if call["bias"] is None else call["bias"]
    return lambda: module.LigerLayerNormFunction.apply(x, weight, bias, _number(call["eps"]))


@PEER.op("swiglu", timed=_on_gpu)
def _swiglu(call: dict[str, Any]) -> Thunk:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    _compiled_only()
    gate, up = call["gate"], call["up"]
    return lambda: LigerSiLUMulFunction.apply(gate, up)
