"""Attention on the paged cache of transformers' continuous batching, in the layout in which the cache lies.

A step packs the new tokens of all sequences into one row, q [1, Hq, T, D].  It goes as it lies to `attention_varlen`,
which reads the pages through a block table and copies nothing: prompts, chunks of prompts and tokens that are decoded
in one call.  Where every sequence has one new token it is `attention_decode`'s, which can split long pasts.  What
depends on the step and not on the layer (the block table, lengths) is computed once, at the first layer.

transformers 5.23 hands a registered function what it hands its own: `cache`, `cu_seq_lens_q`, `cu_seq_lens_k`,
`read_index` and `write_index` (slots of tokens), or `block_table` where every sequence has one new token.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import ops
from llmkern.integrations.transformers.attention import HARMLESS

__all__ = ["PAGED", "paged_attention_forward", "register_paged", "why_not_paged"]

PAGED = "llmkern_paged"
"""The name in `config._attn_implementation`."""

# What continuous batching passes along besides; each is said by the lengths, or is for others.
_STEP = frozenset({"is_causal", "logits_indices", "logits_processor_args", "max_length_k", "max_length_q"})


@dataclass(frozen=True)
class _Step:
    """Cache positions that one forward reads and writes, for every layer of an allocator.

    write: int64 [T], the slot of each new token.  starts: int32 [B + 1], where each sequence's new tokens begin in the
    packed row, and the end; None if each has one token.  table: int32 [B, max_blocks], the pages of each sequence.
    lengths: int32 [B], the keys of each sequence, its new tokens included.
    """

    write: Tensor
    starts: Tensor | None
    table: Tensor
    lengths: Tensor


def register_paged() -> None:
    """Make `PAGED` known to transformers; nothing uses it until a model is set to it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PAGED, paged_attention_forward)
    AttentionMaskInterface.register(PAGED, _no_mask)


def why_not_paged(config: Any) -> str | None:
    """Return why a model with this config keeps transformers' own paged attention, or None."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"} or (not kinds and getattr(config, "sliding_window", None) is not None):
        return "its layers have a sliding window, whose pages have no block table"
    return None


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cache: Any = None,
    read_index: list[Tensor] | None = None,
    write_index: list[Tensor] | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: dict[str, Tensor] | None = None,
    block_table: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function on a paged cache: q [1, Hq, T, D], k/v [1, Hkv, T, D] → [1, T, Hq, D].

    Writes the new keys and values into their pages.  Raises ValueError without a cache, and for an argument that is
    not known: it may change the result.
    """
    if cache is None or cu_seq_lens_q is None or cu_seq_lens_k is None:
        raise ValueError(f"{PAGED} attention serves continuous batching only; set_attn_implementation('sdpa')")
    for name, argument in kwargs.items():
        if argument is not None and name not in HARMLESS and name not in _STEP and argument is not False:
            raise ValueError(f"the model passes {name} to its attention, which {PAGED} does not know")
    layer: int = module.layer_idx  # type: ignore[assignment]
    allocator = cache.layer_to_allocator[layer]
    if layer == allocator.layer_indices[0]:
        allocator.llmkern_step = _plan(allocator, cu_seq_lens_q, cu_seq_lens_k, read_index, write_index, block_table)
    step: _Step = allocator.llmkern_step
    k_tokens, v_tokens = allocator._kv_token_views[layer]  # [slots, Hkv, D]
    k_tokens.index_copy_(0, step.write, key[0].transpose(0, 1))
    v_tokens.index_copy_(0, step.write, value[0].transpose(0, 1))
    rows = query[0].transpose(0, 1)  # [T, Hq, D]
    options: dict[str, Any] = {
        "block_table": step.table,
        "sm_scale": scaling,
        "softcap": softcap,
        "sinks": None if s_aux is None else s_aux.to(query.dtype),
    }
    k, v = allocator.get_cache_for_block_table(layer)  # [pages, page_size, Hkv, D]
    if step.starts is None:
        pages = k.transpose(1, 2), v.transpose(1, 2)
        return ops.attention_decode(rows[:, :, None], *pages, step.lengths, **options)[None, :, :, 0], None
    return ops.attention_varlen(rows, k, v, step.starts, seqused_k=step.lengths, causal=True, **options)[None], None


def _plan(
    allocator: Any,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: dict[str, Tensor],
    read_index: list[Tensor] | None,
    write_index: list[Tensor] | None,
    block_table: Tensor | None,
) -> _Step:
    page = allocator.tokens_per_page
    ends_k = cu_seq_lens_k[allocator.layer_type]
    if block_table is not None:  # every sequence has one new token, and transformers has prepared no slots
        lengths = (ends_k[1:] - ends_k[:-1]).to(torch.int32)
        table = block_table[allocator.index]
        last = (lengths - 1).long()
        blocks = table.gather(1, (last // page)[:, None]).squeeze(1)
        return _Step(blocks * page + last % page, None, table, lengths)
    assert read_index is not None
    assert write_index is not None
    read, write = read_index[allocator.index], write_index[allocator.index]
    starts, starts_k = cu_seq_lens_q.tolist(), ends_k.tolist()
    slots, slots_at = (read, starts_k) if read.numel() else (write, starts)  # nothing is read where all is new
    blocks_ = [slots[begin:end:page] // page for begin, end in pairwise(slots_at)]
    table = torch.nn.utils.rnn.pad_sequence(blocks_, batch_first=True).to(torch.int32)
    single = starts == list(range(len(starts)))
    return _Step(write, None if single else cu_seq_lens_q, table, (ends_k[1:] - ends_k[:-1]).to(torch.int32))


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Build no mask: lengths say what each token sees."""
