from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llmkern.bench.sweep import Sweep, Work, tensor_bytes

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
CHECK = {"B": 1, "Hq": 4, "Hkv": 1, "Sq": 256, "Skv": 256}


def _sweep(dim: int, *, causal: bool) -> Sweep:
    """Queries and keys of one length, GQA 32/8."""
    return Sweep(
        f"dim {dim}{', causal' if causal else ''}",
        ("Sq", "Skv"),
        LENGTHS,
        {"B": 1, "Hq": 32, "Hkv": 8, "D": dim},
        {"causal": causal},
        modes=("forward", "backward"),
        quick_on_gpu=True,
        check=CHECK,
    )


SWEEPS = (
    *[_sweep(dim, causal=causal) for dim in (128, 64, 256) for causal in (True, False)],
    Sweep(
        "SmolLM2-135M, causal",
        ("Sq", "Skv"),
        (128, 256, 512, 1024, 2048),
        {"B": 1, "Hq": 9, "Hkv": 3, "D": 64},
        {"causal": True},
        modes=("forward", "backward"),
        quick=(512,),
        check=CHECK,
    ),
)


def work(call: Mapping[str, Any], out: tuple[Any, Any]) -> Work:
    """Two products for each pair of a query and a key that it sees."""
    q, k, v = call["q"], call["k"], call["v"]
    return attention_work([*call.values(), *out], q, k.shape[2], v.shape[3], causal=call["causal"])


def attention_work(tensors: list[Any], q: Tensor, keys: int, value_dim: int, *, causal: bool) -> Work:
    """Return the work of an attention that reads and writes `tensors` once, with at least as many keys as queries."""
    batch, heads, queries, dim = q.shape
    pairs = queries * keys - (queries * (queries - 1) // 2 if causal else 0)
    operations = 2 * batch * heads * pairs * (dim + value_dim)
    return Work(tensor_bytes(tensors), operations, str(q.dtype).removeprefix("torch."))
