"""attention_decode against attention over each sequence's own tokens, collected one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llmkern import dispatch, ops
from llmkern.dispatch import use_backend
from llmkern.testing.case import Call, Case, cases
from llmkern.testing.compare import upcast

BACKENDS = ("reference", "torch")  # in float64; what a native kernel computes is judged by the contract's tests
PAGED = [c for c in cases("attention_decode") if c.dtype == torch.float32 and c.name.startswith("paged")]


def tokens(cache: Tensor, b: int, length: int, block_table: Tensor | None) -> Tensor:
    """[1, Hkv, length, D]: what is cached of sequence b, position by position."""
    if block_table is None:
        return cache[b : b + 1, :, :length]
    size = cache.shape[2]
    rows = [cache[int(block_table[b, p // size]), :, p % size] for p in range(length)]
    return torch.stack(rows, 1)[None] if rows else cache[:1, :, :0]


def one_by_one(call: Call) -> tuple[Tensor, Tensor]:
    """Each sequence alone, without padding: causal attention aligned to the bottom right."""
    q, k_cache, v_cache, table = call["q"], call["k_cache"], call["v_cache"], call["block_table"]
    out = q.new_zeros(*q.shape[:3], v_cache.shape[3])
    lse = q.new_zeros(q.shape[:3])
    for b, length in enumerate(call["seq_lens"].tolist()):
        k, v = tokens(k_cache, b, length, table), tokens(v_cache, b, length, table)
        if call["k_scale"] is not None:
            k = k * tokens(call["k_scale"][..., None], b, length, table)
            v = v * tokens(call["v_scale"][..., None], b, length, table)
        shared = {name: call[name] for name in ("sinks", "sm_scale", "window", "softcap")}
        with use_backend("reference"):
            out[b : b + 1], lse[b : b + 1] = ops.attention(q[b : b + 1], k, v, causal=True, return_lse=True, **shared)
    return out, lse


@pytest.mark.parametrize("case", [c for c in cases("attention_decode") if c.dtype == torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_sequence_as_if_it_were_alone(case: Case, backend: str) -> None:
    call = upcast(case.make())
    impl = dispatch.implementation("attention_decode", backend)
    if reason := impl.why_not(**call):
        pytest.skip(reason)
    out, lse = impl.fn(**call)
    want_out, want_lse = one_by_one(call)
    assert not want_out.isnan().any()
    torch.testing.assert_close(out, want_out, rtol=1e-12, atol=1e-12)
    if call["return_lse"]:
        torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [c for c in cases("attention_decode") if not c.make()["return_lse"]], ids=str)
def test_torch_backend_against_the_reference(case: Case) -> None:
    call = case.make()
    out, _ = dispatch.implementation("attention_decode", "torch").fn(**call)
    want, _ = dispatch.implementation("attention_decode", "reference").fn(**upcast(call))
    tolerance = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[case.dtype]
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_inside_the_sequence_is_not_hidden(backend: str) -> None:
    call = cases("attention_decode")[0].make()
    call["v_cache"][1, 0, 7, 3] = math.nan
    with use_backend(backend):
        out = ops.attention_decode(**call)
    assert out.isnan().nonzero().tolist() == [[1, 0, 0, 3], [1, 1, 0, 3]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", PAGED, ids=str)
def test_entries_outside_the_cache_read_nothing_outside_it(backend: str, case: Case) -> None:
    """Wild entries within the sequence and lengths past the capacity: the caller's mistake, but no crash."""
    call = case.make() | {"return_lse": False}
    call["block_table"] = torch.full_like(call["block_table"], 2**31 - 1)
    call["seq_lens"] = torch.full_like(call["seq_lens"], 10_000)
    with use_backend(backend):
        assert ops.attention_decode(**call).shape == call["q"].shape


def test_a_gradient_is_refused_not_cut() -> None:
    call = cases("attention_decode")[0].make()
    call["q"].requires_grad_()
    with pytest.raises(dispatch.Refused, match="attention_decode has no gradient"):
        ops.attention_decode(**call)


def tensors(**replaced: object) -> dict[str, object]:
    cache = torch.zeros(2, 2, 16, 8)
    call = {"q": torch.zeros(2, 4, 1, 8), "k_cache": cache, "v_cache": cache, "seq_lens": torch.tensor([3, 4])}
    return call | replaced


TABLE = torch.zeros(2, 3, dtype=torch.int32)
SCALE = torch.ones(2, 2, 16)


def int8_tensors(**replaced: object) -> dict[str, object]:
    codes = torch.zeros(2, 2, 16, 8, dtype=torch.int8)
    return tensors(**{"k_cache": codes, "v_cache": codes, "k_scale": SCALE, "v_scale": SCALE} | replaced)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (tensors(q=torch.zeros(2, 4, 17, 8)), ValueError, "q has 17 queries, expected 1 to 16; use attention for more"),
        (tensors(q=torch.zeros(2, 4, 0, 8)), ValueError, "q has 0 queries, expected 1 to 16"),
        (tensors(q=torch.zeros(2, 5, 1, 8)), ValueError, "q has 5 heads, expected a multiple of k_cache's 2"),
        (tensors(v_cache=torch.zeros(2, 2, 15, 8)), ValueError, r"v_cache has shape \[2, 2, 15, 8\]"),
        (tensors(v_cache=torch.zeros(2, 2, 16, 8).half()), TypeError, "v_cache is torch.float16"),
        (tensors(q=torch.zeros(3, 4, 1, 8), seq_lens=torch.ones(3).int()), ValueError, "needs a block_table"),
        (tensors(seq_lens=torch.tensor([3.0, 4.0])), TypeError, "seq_lens is torch.float32, expected torch.int32 or"),
        (tensors(seq_lens=[3, 4]), TypeError, "seq_lens is a list, expected a Tensor"),
        (tensors(seq_lens=torch.tensor([3])), ValueError, r"seq_lens has shape \[1\], expected \[2\]"),
        (tensors(seq_lens=torch.ones(2, device="meta").int()), ValueError, "seq_lens is on meta, expected cpu"),
        (tensors(block_table=TABLE.long()), TypeError, "block_table is torch.int64, expected torch.int32"),
        (tensors(block_table=TABLE[0]), ValueError, r"block_table has shape \[3\], expected \[2, max_blocks\]"),
        (tensors(block_table=TABLE[:1]), ValueError, r"block_table has shape \[1, 3\], expected \[2, max_blocks\]"),
        (int8_tensors(k_cache=torch.zeros(2, 2, 16, 8)), TypeError, "k_cache is torch.float32, expected torch.int8"),
        (int8_tensors(k_scale=None), ValueError, "k_scale is None, expected one beside the other: both or neither"),
        (int8_tensors(v_scale=None), ValueError, "v_scale is None, expected one beside the other: both or neither"),
        (int8_tensors(k_scale=None, v_scale=None), TypeError, "k_cache is torch.int8, expected q's dtype, or k_scale"),
        (int8_tensors(v_scale=SCALE.half()), TypeError, "v_scale is torch.float16, expected torch.float32"),
        (int8_tensors(v_scale=SCALE[:, :1]), ValueError, r"v_scale has shape \[2, 1, 16\], expected \[2, 2, 16\]"),
        (int8_tensors(k_scale=SCALE.to("meta")), ValueError, "k_scale is on meta, expected cpu"),
        (tensors(sinks=torch.zeros(3)), ValueError, r"sinks has shape \[3\], expected \[4\]"),
        (tensors(window=-3), ValueError, "window is -3"),
        (tensors(softcap=math.inf), ValueError, "softcap is inf"),
        (tensors(sm_scale=math.inf), ValueError, "sm_scale is inf"),
    ],
)
def test_bad_input(call: dict, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=f"^attention_decode: .*{sentence}"):
        ops.attention_decode(**call)


def test_a_table_into_an_empty_cache() -> None:
    empty = torch.zeros(0, 2, 4, 8)
    with pytest.raises(ValueError, match="k_cache has 0 blocks"):
        ops.attention_decode(**tensors(k_cache=empty, v_cache=empty, block_table=TABLE))


def test_codes_are_read_in_the_precision_of_a_float64_query() -> None:
    k = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.int8)
    scale, seq_lens = torch.full((1, 1, 2), 0.5), torch.tensor([2])
    q, exact = torch.ones(1, 1, 1, 2, dtype=torch.float64), k.double() * 0.5
    out = ops.attention_decode(q, k, k, seq_lens, k_scale=scale, v_scale=scale, return_lse=True)
    torch.testing.assert_close(out, ops.attention_decode(q, exact, exact, seq_lens, return_lse=True))
