"""llmkern.KVCache in int8: codes with their scales, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from kv_caches import HYBRID, OPERATIONS, config, states, update
from transformers import DynamicCache

import llmkern
from llmkern.integrations.transformers.kv_layers import Int8KVLayer, Int8SlidingKVLayer


@torch.no_grad()
@pytest.mark.parametrize("kinds", [(), HYBRID], ids=["lazy", "hybrid"])
def test_int8_holds_codes_to_half_a_step(kinds: tuple[str, ...]) -> None:
    got = llmkern.KVCache(config(*kinds) if kinds else None, dtype="int8")
    expected = DynamicCache(config=config(*kinds) if kinds else None)
    for step, tokens in enumerate((9, 1, 1, 70, 1)):
        for ours, theirs in zip(update(got, tokens, seed=step), update(expected, tokens, seed=step), strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert a.dtype == b.dtype
                assert a.shape == b.shape
                half_step = b.abs().amax(-1, keepdim=True) / 254
                assert bool(((a - b).abs() <= half_step * 1.001).all())
    assert [type(layer) for layer in got.layers] == ([Int8KVLayer, Int8SlidingKVLayer] if kinds else [Int8KVLayer] * 2)
    for layer in got.layers:
        assert layer.k_buffer.dtype == layer.v_buffer.dtype == torch.int8
        assert layer.k_scale_buffer.shape == layer.k_buffer.shape[:3]
        assert layer.k_scale_buffer.dtype == torch.float32


@torch.no_grad()
def test_int8_gives_the_first_states_back_as_they_are() -> None:
    cache = llmkern.KVCache(dtype="int8")
    k, v = states(5)
    keys, values = cache.update(k, v, 0)
    assert keys is k
    assert values is v


@torch.no_grad()
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", HYBRID)
def test_operations_of_int8_move_codes_with_their_scales(operation: str, kind: str) -> None:
    plain, int8 = [llmkern.KVCache(config(kind), dtype=dtype) for dtype in (None, "int8")]
    for cache in (plain, int8):
        update(cache, 4)
        OPERATIONS[operation](cache)
    assert plain.layers[0].keys.shape == int8.layers[0].keys.shape
    torch.testing.assert_close(int8.layers[0].keys, plain.layers[0].keys, atol=0.02, rtol=0)
    torch.testing.assert_close(int8.layers[0].values, plain.layers[0].values, atol=0.02, rtol=0)


def test_int8_refuses_what_codes_cannot_do() -> None:
    cache = llmkern.KVCache(dtype="int8")
    k, v = states(3)
    with pytest.raises(RuntimeError, match="no gradient"):
        cache.update(k.clone().requires_grad_(), v, 0)
    cache.update(k, v, 0)
    with pytest.raises(AttributeError, match="only update"):
        cache.layers[0].keys = k
    with pytest.raises(ValueError, match=r"key_states has shape \[1, 3, 1, 16\], expected \[2, 3, 1, 16\]"):
        cache.update(*states(1, batch=1), 0)


def test_dtypes_are_none_and_int8() -> None:
    with pytest.raises(ValueError, match="KVCache: dtype is 'int4', expected None or 'int8'"):
        llmkern.KVCache(dtype="int4")
