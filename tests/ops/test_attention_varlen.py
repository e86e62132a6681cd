"""attention_varlen against attention over each sequence's own queries and keys, collected one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmkern import dispatch, ops
from llmkern.dispatch import use_backend
from llmkern.testing.case import Call, Case, cases
from llmkern.testing.compare import assert_same_bits, upcast

FP32 = [case for case in cases("attention_varlen") if case.dtype == torch.float32]
PAGED = [case for case in FP32 if case.make()["block_table"] is not None and case.name != "freed-pages"]


def tokens(x: Tensor, b: int, call: Call) -> Tensor:
    """[1, Hkv, keys, D]: the keys or values of sequence b, position by position; 0 for pages that were freed."""
    if call["cu_seqlens_k"] is not None:
        start, end = call["cu_seqlens_k"].tolist()[b : b + 2]
        return x[start:end].transpose(0, 1)[None]
    length, table = int(call["seqused_k"][b]), call["block_table"]
    if table is None:
        return x[b, :length].transpose(0, 1)[None]
    size = x.shape[1]
    rows = [x[int(table[b, p // size].clamp(0)), p % size] * (table[b, p // size] >= 0) for p in range(length)]
    return torch.stack(rows, 1)[None].nan_to_num() if rows else x[:0, 0].transpose(0, 1)[None]


def one_by_one(call: Call, backend: str = "reference") -> tuple[Tensor, Tensor]:
    """Each sequence alone."""
    q, starts = call["q"], call["cu_seqlens_q"].tolist()
    out = q.new_zeros(*q.shape[:2], call["v"].shape[-1])
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf)
    options = {name: call[name] for name in ("sinks", "causal", "sm_scale", "window", "softcap")}
    for b in range(len(starts) - 1):
        own = slice(starts[b], starts[b + 1])
        k, v = tokens(call["k"], b, call), tokens(call["v"], b, call)
        with use_backend(backend):
            found, sums = ops.attention(q[own].transpose(0, 1)[None], k, v, return_lse=True, **options)
        out[own], lse[:, own] = found[0].transpose(0, 1), sums[0]
    return out, lse


@pytest.mark.parametrize("case", FP32, ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_each_sequence_as_if_it_were_alone(case: Case, backend: str) -> None:
    call = upcast(case.make())
    impl = dispatch.implementation("attention_varlen", backend)
    call["return_lse"] &= backend == "reference"
    out, lse = impl.fn(**call)
    want_out, want_lse = one_by_one(call)
    torch.testing.assert_close(out, want_out, rtol=1e-12, atol=1e-12)
    if call["return_lse"]:
        torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


def part(call: Call, chosen: list[int]) -> tuple[Call, Tensor]:
    """(the call of these sequences only, in this order; their rows in the whole call's result)."""
    starts = call["cu_seqlens_q"].tolist()
    rows = torch.cat([torch.arange(starts[b], starts[b + 1]) for b in chosen])
    lengths = torch.tensor([0, *[starts[b + 1] - starts[b] for b in chosen]])
    named = {name: call[name][chosen] for name in ("seqused_k", "block_table")}
    return call | named | {"q": call["q"][rows], "cu_seqlens_q": lengths.cumsum(0).int()}, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chosen", [[0], [3], [1, 4], [5, 3, 2, 0, 1, 4]], ids=str)
def test_bits_do_not_depend_on_who_shares_the_call(dtype: torch.dtype, chosen: list[int]) -> None:
    impl = dispatch.implementation("attention_varlen", "cpu")
    if impl.backend.missing:
        pytest.skip(impl.backend.missing)
    case = next(c for c in cases("attention_varlen") if c.name == "mixed-nan" and c.dtype == dtype)
    call = case.make()
    out, lse = impl.fn(**call)
    fewer, rows = part(call, chosen)
    own_out, own_lse = impl.fn(**fewer)
    assert_same_bits([own_out, own_lse], [out[rows], lse[:, rows]])


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("case", PAGED, ids=str)
def test_wild_entries_and_lengths_read_nothing_outside_the_cache(backend: str, case: Case) -> None:
    """The caller's mistake, but no crash."""
    impl = dispatch.implementation("attention_varlen", backend)
    if impl.backend.missing:
        pytest.skip(impl.backend.missing)
    call = case.make() | {"return_lse": False}
    call["block_table"] = torch.full_like(call["block_table"], 2**31 - 1)
    call["seqused_k"] = torch.full_like(call["seqused_k"], 10_000)
    assert impl.fn(**call)[0].shape == call["q"].shape


def test_a_gradient_is_refused_not_cut() -> None:
    call = FP32[0].make()
    call["q"].requires_grad_()
    with pytest.raises(dispatch.Refused, match="attention_varlen has no gradient"):
        ops.attention_varlen(**call)


def given(**replaced: Any) -> dict[str, Any]:
    lengths = torch.tensor([0, 3, 5], dtype=torch.int32)
    k = torch.zeros(5, 2, 8)
    return {"q": torch.zeros(5, 4, 8), "k": k, "v": k, "cu_seqlens_q": lengths, "cu_seqlens_k": lengths} | replaced


def cached(**replaced: Any) -> dict[str, Any]:
    cache, lengths = torch.zeros(2, 16, 2, 8), torch.tensor([3, 4], dtype=torch.int32)
    return given(k=cache, v=cache, cu_seqlens_k=None, seqused_k=lengths) | replaced


TABLE = torch.zeros(2, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (given(cu_seqlens_k=None), ValueError, "neither is given of cu_seqlens_k"),
        (given(seqused_k=TABLE[:, 0]), ValueError, "both are given of cu_seqlens_k"),
        (given(block_table=TABLE), ValueError, "block_table is given beside cu_seqlens_k, expected seqused_k"),
        (given(q=torch.zeros(1, 5, 4, 8)), ValueError, r"q has shape \[1, 5, 4, 8\], expected 3 dimensions"),
        (given(q=torch.zeros(5, 5, 8)), ValueError, "q has 5 heads, expected a multiple of k's 2"),
        (given(q=torch.zeros(5, 4, 9)), ValueError, r"k has head dimension 8, expected 9 \(q's\)"),
        (given(v=torch.zeros(4, 2, 8)), ValueError, r"v has shape \[4, 2, 8\]"),
        (given(v=torch.zeros(5, 2, 8).half()), TypeError, "v is torch.float16"),
        (given(cu_seqlens_q=torch.tensor([0, 5])), TypeError, "cu_seqlens_q is torch.int64, expected torch.int32"),
        (given(cu_seqlens_q=TABLE[0, :0]), ValueError, r"cu_seqlens_q has shape \[0\], expected \[B \+ 1\]"),
        (given(cu_seqlens_k=TABLE[0, :2]), ValueError, r"cu_seqlens_k has shape \[2\], expected \[3\] .* 2 sequences"),
        (given(cu_seqlens_q=torch.zeros(3, 2).int()[:, 0]), ValueError, "cu_seqlens_q has stride 2, expected 1"),
        (cached(k=torch.zeros(5, 2, 8)), ValueError, r"k has shape \[5, 2, 8\], expected 4 dimensions"),
        (cached(seqused_k=TABLE[0]), ValueError, r"seqused_k has shape \[3\], expected \[2\] .* 2 sequences"),
        (
            cached(cu_seqlens_q=TABLE[0, :2], seqused_k=TABLE[:1, 0]),
            ValueError,
            "k has batch size 2, expected 1 .*needs",
        ),
        (cached(block_table=TABLE[:1]), ValueError, r"block_table has shape \[1, 3\], expected \[2, max_blocks\]"),
        (cached(block_table=TABLE.long()), TypeError, "block_table is torch.int64, expected torch.int32"),
        (given(sinks=torch.zeros(3)), ValueError, r"sinks has shape \[3\]"),
        (given(window=-2), ValueError, "window is -2"),
        (given(softcap=-1.0), ValueError, "softcap is -1.0"),
        (given(causal=1), TypeError, "causal is 1"),
    ],
)
def test_bad_input_is_named(call: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=f"attention_varlen: {sentence}"):
        ops.attention_varlen(**call)
