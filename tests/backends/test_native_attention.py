"""The native attention kernels beyond the shared cases: odd sizes, strides beyond 2³¹, what they refuse and check."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmkern import _native, dispatch
from llmkern.testing.case import Call
from llmkern.testing.cases.attention import plain_call
from llmkern.testing.judge import assert_accurate

pytestmark = pytest.mark.skipif(_native.reason() is not None, reason=str(_native.reason()))
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def decode_call(q: Tensor, k_cache: Tensor, v_cache: Tensor, **options: object) -> Call:
    lengths = torch.full(q.shape[:1], k_cache.shape[2], dtype=torch.int32)
    call = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "seq_lens": lengths, "block_table": None, "k_scale": None}
    call |= {"v_scale": None, "sinks": None, "sm_scale": q.shape[3] ** -0.5, "window": [-1, -1], "softcap": 0.0}
    return call | {"return_lse": False} | options


def assert_native_is_as_accurate(op: str, call: Call) -> None:
    assert_accurate(op, call, getattr(torch.ops.llmkern, op)(**call))


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 1023), (239, 1), (113, 203), (799, 3)])
@pytest.mark.parametrize("dim", [59, 64])
def test_attention_of_odd_sizes(isa, dtype, queries, keys, dim) -> None:
    torch.manual_seed(0)
    q, (k, v) = torch.randn(1, 4, queries, dim, dtype=dtype), torch.randn(2, 1, 2, keys, dim, dtype=dtype)
    for causal in (False, True):
        assert_native_is_as_accurate("attention", plain_call(q, k, v, causal=causal))


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_lie_anywhere(isa, dtype) -> None:
    """Unaligned, heads and tokens in any order: the bits of contiguous copies."""
    fused = torch.randn(2, 70, 9, 3 * 24 + 1, dtype=dtype)[..., 1:].transpose(1, 2)
    q, k, v = fused.split(24, -1)
    mask = torch.randn(1, 9, 70, 141)[..., 1::2]
    call = plain_call(q, k, v, attn_mask=mask, return_lse=True)
    plain = {name: value.contiguous() if isinstance(value, Tensor) else value for name, value in call.items()}
    for got, want in zip(torch.ops.llmkern.attention(**call), torch.ops.llmkern.attention(**plain), strict=True):
        assert torch.equal(got, want)
    step = decode_call(q[:, :, :3], k, v)
    plain = decode_call(q[:, :, :3].contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(torch.ops.llmkern.attention_decode(**step)[0], torch.ops.llmkern.attention_decode(**plain)[0])


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_strides_beyond_32_bits(isa) -> None:
    """Two sequences 2³² bytes apart in a storage of which nothing else is touched."""
    apart = 2**31
    storage = torch.empty(apart + 3 * 8, dtype=torch.bfloat16)
    far = storage.as_strided((2, 1, 3, 8), (apart, 24, 8, 1))
    far.copy_(torch.randn(2, 1, 3, 8))
    near, q = far.contiguous(), torch.randn(2, 2, 1, 8, dtype=torch.bfloat16)
    for op, make in (("attention", plain_call), ("attention_decode", decode_call)):
        operator = getattr(torch.ops.llmkern, op)
        assert torch.equal(operator(**make(q, far, far))[0], operator(**make(q, near, near))[0])


@pytest.mark.parametrize(
    ("op", "change", "reason"),
    [
        ("attention", {"q": torch.zeros(1, 2, 5, 264)}, "q has head dimension 264; at most 256 is taken"),
        ("attention", {"k": torch.zeros(1, 2, 8, 5).transpose(2, 3)}, "k's last dimension has stride 5; only 1"),
        ("attention", {"sinks": torch.zeros(2).double()}, "sinks is torch.float64; float32, bfloat16 and float16"),
        ("attention", {"sinks": torch.zeros(4)[::2]}, "sinks is not contiguous"),
        ("attention_decode", {"v_cache": torch.zeros(1, 2, 5, 264)}, "v_cache has head dimension 264; at most 256"),
        ("attention_decode", {"q": torch.zeros(1, 2, 5, 8).double()}, "takes float32, bfloat16, float16, not float64"),
    ],
)
def test_what_they_refuse(op, change, reason) -> None:
    tensors = torch.zeros(3, 1, 2, 5, 8)
    call = (plain_call if op == "attention" else decode_call)(*tensors) | change
    assert dispatch.implementation(op, "cpu").why_not(**call).startswith(reason)


def test_the_operators_check_what_they_would_read() -> None:
    q, k, v = torch.zeros(3, 1, 2, 5, 8)
    for message, call in (
        ("q has 2 heads, which is no multiple of k's 3", plain_call(q, *torch.zeros(2, 1, 3, 5, 8))),
        ("k and v differ before the last dimension", plain_call(q, k, v[:, :, :4])),
        ("attn_mask has size 4 in dimension 3, expected 1 or 5", plain_call(q, k, v, attn_mask=k[:, :, :, :4])),
        ("key_padding_mask must be bool of shape", plain_call(q, k, v, key_padding_mask=torch.ones(1, 4).bool())),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.llmkern.attention(**call)
    for message, call in (
        ("k_cache has batch size 1, q has 2", decode_call(q.expand(2, 2, 5, 8), k, v)),
        ("k_scale and v_scale are given both or neither", decode_call(q, k, v, k_scale=torch.ones(1, 2, 5))),
        ("seq_lens must be int32 or int64", decode_call(q, k, v, seq_lens=torch.ones(1))),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.llmkern.attention_decode(**call)


def test_decode_leaves_many_rows_in_bf16_to_pytorch() -> None:
    q, cache = torch.zeros(1, 6, 16, 8, dtype=torch.bfloat16), torch.zeros(1, 2, 20, 8, dtype=torch.bfloat16)
    why_not = dispatch.implementation("attention_decode", "cpu").why_not
    assert why_not(**decode_call(q, cache, cache)).startswith("48 queries share a key head; at most 32 are taken")
    assert why_not(**decode_call(q[:, :, :10], cache, cache)) is None
    assert why_not(**decode_call(q.float(), cache.float(), cache.float())) is None
