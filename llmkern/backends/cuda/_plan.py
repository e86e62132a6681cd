"""Descriptions of launches, by the launchers' own heuristics (csrc/include/llmkern/plan.h) from `llmkern._C`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "activate",
    "attention",
    "attention_decode",
    "int8_linear",
    "norm",
    "product",
    "quantize",
    "quantized_activation",
    "rope",
]

NOTHING = "nothing is launched: there are no elements"
_SM_COUNT = {(8, 0): 108, (8, 6): 84, (8, 9): 142, (9, 0): 132, (10, 0): 148, (12, 0): 170}
"""SMs of the GPU most used with each compute capability: A100, RTX A6000, L40S, H100 SXM, B200, RTX 5090."""


def _gpu(capability: tuple[int, int] | None, device: torch.device) -> tuple[int, int]:
    """Return the number of SMs and the compute capability as `_C.plan` takes it, 10 * major + minor."""
    if capability is None:
        properties = torch.cuda.get_device_properties(device)
        return properties.multi_processor_count, 10 * properties.major + properties.minor
    older = [known for known in _SM_COUNT if known <= capability]
    return _SM_COUNT[max(older) if older else (8, 0)], 10 * capability[0] + capability[1]


def _plan(
    kernel: str, shape: Sequence[int], lead: Tensor, capability: tuple[int, int] | None, *, aligned: bool = True
) -> str:
    """One line; empty without `llmkern._C`.  Nothing is launched for empty tensors."""
    sm_count, sm_version = _gpu(capability, lead.device)
    if 0 in shape[:2]:
        return NOTHING
    try:
        introspection = importlib.import_module("llmkern._C")
        plan = introspection.plan(kernel, list(shape), lead.element_size(), aligned, sm_count, sm_version)
    except ImportError:
        return ""
    parts = [f"{plan['kernel']}: {plan['blocks']} blocks of {plan['threads']} threads"]
    if "tile" in plan:
        parts.append(f"{plan['tile'][0]}x{plan['tile'][1]} of the result each")
    if plan.get("parts", 1) > 1:
        parts.append(f"{plan['parts']} parts of K")
    if "queries" in plan:
        parts.append(f"{plan['queries']} queries of a head each, by {plan['keys']} keys of {plan['dim']} dimensions")
    if "splits" in plan:
        parts.append(f"{plan['rows']} packed queries by {plan['keys']} keys a step")
        parts.append(f"{plan['splits']} splits of the keys")
    if plan.get("stages", 1) > 1:
        parts.append(f"{plan['stages']} stages")
    if "vector" in plan:
        parts.append("a warp per row" if plan["rows_per_block"] > 1 else "a block per row")
        parts.append(f"{plan['vector']} elements per access, {plan['held']} of these held per thread")
    if plan["shared_bytes"]:
        parts.append(f"{plan['shared_bytes']} bytes of shared memory")
    parts.append(f"{plan['blocks_per_sm']} blocks on an SM at a time")
    return ", ".join(parts) + f" (on {sm_count} SMs)"


def _rows_aligned(*tensors: Tensor | None) -> bool:
    """Return True if rows begin at multiples of 16 bytes, if the tensors' first elements do."""
    for tensor in tensors:
        if tensor is not None and any(stride * tensor.element_size() % 16 for stride in tensor.stride()[:-1]):
            return False
    return True


def norm(capability: tuple[int, int] | None, *, x: Tensor, residual: Tensor | None = None, **_: object) -> str:
    """Describe the kernel of every normalisation."""
    shape = (x.shape[:-1].numel(), x.shape[-1])
    return _plan("norm", shape, x, capability, aligned=_rows_aligned(x, residual))


def quantized_activation(capability: tuple[int, int] | None, *, gate: Tensor, up: Tensor) -> str:
    shape = (gate.shape[:-1].numel(), gate.shape[-1])
    return _plan("activate_codes", shape, gate, capability, aligned=_rows_aligned(gate, up))


def quantize(capability: tuple[int, int] | None, *, x: Tensor) -> str:
    shape = (x.shape[:-1].numel(), x.shape[-1])
    return _plan("quantize_int8", shape, x, capability, aligned=_rows_aligned(x))


def activate(lead: str) -> Callable[..., str]:
    """Describe the kernel of an activation whose first argument is called `lead`."""

    def describe(capability: tuple[int, int] | None, **call: Any) -> str:
        tensors = [value for value in call.values() if isinstance(value, Tensor)]
        x = call[lead]
        # Rows without gaps are one long row.
        dense = all(tensor.is_contiguous() for tensor in tensors)
        shape = (1, x.numel()) if dense or x.dim() == 0 else (x.shape[:-1].numel(), x.shape[-1])
        aligned = shape[1] * x.element_size() % 16 == 0 and (dense or _rows_aligned(*tensors))
        return _plan("activate", shape, x, capability, aligned=aligned)

    return describe


def rope(
    capability: tuple[int, int] | None, *, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, **_: object
) -> str:
    batch, heads, length, dim = q.shape
    halves = rotary_dim // 2 * q.element_size() % 16 == 0 and dim * q.element_size() % 16 == 0
    shape = (batch * length, heads + k.shape[1], dim, rotary_dim)
    return _plan("rope", shape, q, capability, aligned=halves and _rows_aligned(q, k, cos, sin))


def product(capability: tuple[int, int] | None, *, a_q: Tensor, w_q: Tensor, **_: object) -> str:
    return _plan("int8_matmul", (a_q.shape[:-1].numel(), *w_q.shape), a_q, capability)


def int8_linear(capability: tuple[int, int] | None, *, x: Tensor, w_q: Tensor, scheme: str, **_: object) -> str:
    codes = scheme == "w8a8"
    launched = _plan("int8_matmul", (x.shape[:-1].numel(), *w_q.shape), w_q if codes else x, capability)
    return "; ".join(filter(None, [quantize(capability, x=x) if codes else "", launched]))


def attention_decode(
    capability: tuple[int, int] | None,
    *,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None,
    window: Sequence[int],
    **_: object,
) -> str:
    batch, heads, queries, dim = q.shape
    kv_heads, slots = k_cache.shape[1:3]
    keys = slots if block_table is None else slots * block_table.shape[1]
    if 0 <= window[0] < keys:
        keys = min(window[0] + queries, keys)
    shape = (batch, kv_heads, heads // kv_heads * queries, keys, max(dim, v_cache.shape[3]))
    return _plan("attention_decode", shape, k_cache, capability)


def attention(
    capability: tuple[int, int] | None, *, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, **_: object
) -> str:
    batch, heads, queries, dim = q.shape
    if queries == 0:
        return NOTHING
    shape = (batch, heads, k.shape[1], queries, k.shape[2], dim, v.shape[3], int(attn_mask is not None))
    return _plan("attention", shape, q, capability)
