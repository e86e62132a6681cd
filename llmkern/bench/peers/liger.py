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


def _on_gpu() -> bool:
    return torch.cuda.is_available()


def _plain(call: dict[str, Any], *absent: str) -> None:
    for name in absent:
        if call.get(name) is not None:
            raise Unsupported(f"without {name} only")


@PEER.op("rms_norm", timed=_on_gpu)
def _rms_norm(call: dict[str, Any]) -> Thunk:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    _plain(call, "bias")
    x, weight, offset = call["x"], call["weight"], call["weight_offset"]
    # Rounds before the weight as Llama's own does; in fp32 from end to end as Gemma's, where the weight has an offset.
    casting = "gemma" if offset else "llama"
    return lambda: LigerRMSNormFunction.apply(x, weight, call["eps"], offset, casting, False)


@PEER.op("layer_norm", timed=_on_gpu)
def _layer_norm(call: dict[str, Any]) -> Thunk:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    x, weight = call["x"], call["weight"]
    bias = torch.zeros_like(weight) if call["bias"] is None else call["bias"]
    return lambda: LigerLayerNormFunction.apply(x, weight, bias, call["eps"])


@PEER.op("swiglu", timed=_on_gpu)
def _swiglu(call: dict[str, Any]) -> Thunk:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gate, up = call["gate"], call["up"]
    return lambda: LigerSiLUMulFunction.apply(gate, up)
