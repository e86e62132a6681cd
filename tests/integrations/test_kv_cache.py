"""llmkern.KVCache holds and returns what transformers' DynamicCache does, without copying the past."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kv_caches import (
    DIM,
    HEADS,
    HYBRID,
    OPERATIONS,
    TRANSFORMERS_4,
    WINDOW,
    assert_same,
    both,
    config,
    states,
    update,
    update_both,
)
from transformers import DynamicCache

import llmkern
from llmkern.integrations.transformers.kv_layers import KVLayer, SlidingKVLayer


@torch.no_grad()
@pytest.mark.parametrize("kinds", [(), HYBRID], ids=["lazy", "hybrid"])
@pytest.mark.parametrize("chunks", [[1] * 140, [70, 1, 1, 60, 3, 1], [5, 1, 1, 1, 9, 1], [6, 6, 6], [7, 200]], ids=str)
def test_returns_what_dynamic_cache_returns(kinds: tuple[str, ...], chunks: list[int]) -> None:
    got, expected = both(*kinds) if kinds else (llmkern.KVCache(), DynamicCache())
    for step, tokens in enumerate(chunks):
        update_both(got, expected, tokens, seed=step)
    assert [type(layer) for layer in got.layers] == ([KVLayer, SlidingKVLayer] if kinds else [KVLayer, KVLayer])


@torch.no_grad()
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("tokens", [4, 70])
@pytest.mark.parametrize("kind", HYBRID)
def test_operations_are_those_of_dynamic_cache(operation: str, tokens: int, kind: str) -> None:
    got, expected = both(kind)
    apply = OPERATIONS[operation]
    for cache in (got, expected):
        if "crop" in operation and hasattr(cache, "activate_past_recording"):
            cache.activate_past_recording()
    update_both(got, expected, tokens)
    if "crop" in operation and TRANSFORMERS_4 and kind == "sliding_attention" and tokens > WINDOW:
        for cache in (got, expected):
            with pytest.raises(ValueError, match="Cannot `crop`"):
                apply(cache)
    else:
        apply(got)
        apply(expected)
        assert_same(got, expected)
    batch = got.layers[0].keys.shape[0]
    for step in range(3):
        update_both(got, expected, 1, seed=step, batch=batch)


@torch.no_grad()
def test_crop_of_a_sliding_layer_that_has_forgotten_is_refused_as_in_transformers() -> None:
    got, expected = both("sliding_attention")
    update_both(got, expected, 5 * WINDOW)
    for cache in (got, expected):
        with pytest.raises((RuntimeError, ValueError), match="crop"):
            cache.crop(-1)
    assert_same(got, expected)


@pytest.mark.skipif(TRANSFORMERS_4, reason="a positive length is accepted")
@torch.no_grad()
def test_crop_to_a_positive_length_is_refused_as_in_transformers() -> None:
    got, expected = both("full_attention")
    update_both(got, expected, 9)
    with pytest.raises(ValueError, match="positive"):
        got.crop(3)
    assert_same(got, expected)


@pytest.mark.skipif(not TRANSFORMERS_4, reason="transformers 5 refuses a positive length")
@torch.no_grad()
def test_crop_to_a_length() -> None:
    got, expected = both("full_attention")
    update_both(got, expected, 9)
    got.crop(3)
    expected.crop(3)
    assert_same(got, expected)
    update_both(got, expected, 2)
    assert all(
        torch.equal(a, b)
        for ours, theirs in zip(got.to_legacy_cache(), expected.to_legacy_cache(), strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )


@torch.no_grad()
def test_a_step_copies_no_past() -> None:
    cache = llmkern.KVCache()
    addresses = []
    for step in range(1000):
        update(cache, 1, seed=step)
        addresses.append(cache.layers[0].k_buffer.data_ptr())
    moves = sum(a != b for a, b in zip(addresses, addresses[1:], strict=False))
    assert moves == 4  # 64 → 128 → 256 → 512 → 1024
    assert cache.layers[0].capacity == 1024


@torch.no_grad()
def test_a_sliding_layer_moves_once_in_a_window_and_stays_small() -> None:
    cache = llmkern.KVCache(config("sliding_attention"))
    moves, buffer = 0, None
    for step in range(500):
        update(cache, 1, seed=step)
        moves += buffer is not cache.layers[0].k_buffer
        buffer = cache.layers[0].k_buffer
    assert cache.layers[0].capacity == 64
    assert moves <= 1 + 500 // (64 - WINDOW)


@torch.no_grad()
def test_a_long_prompt_of_a_sliding_layer_keeps_the_window() -> None:
    cache = llmkern.KVCache(config("sliding_attention"))
    update(cache, 5000)
    assert cache.layers[0].capacity == 64


@torch.no_grad()
def test_reset_starts_anew() -> None:
    for kind in HYBRID:
        got, expected = both(kind)
        update(got, 9)
        got.reset()
        assert got.get_seq_length() == 0
        update_both(got, expected, 3, batch=4, dtype=torch.bfloat16)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_copies_are_whole_and_independent(copied: Callable[[Any], Any], dtype: str | None) -> None:
    cache = llmkern.KVCache(config(*HYBRID), dtype=dtype)
    update(cache, 9)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    other = copied(cache)
    assert type(other) is llmkern.KVCache
    assert other.layers[0].capacity == 9  # without the room to spare
    assert_same(other, cache)
    update(other, 1, seed=5)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    update(cache, 1, seed=5)
    assert_same(other, cache)


def test_gradients_are_those_of_dynamic_cache() -> None:
    grads = []
    for cache in both(*HYBRID):
        torch.manual_seed(0)
        total, leaves = 0.0, []
        for step in range(3):
            for layer in range(2):
                k, v = [s.clone().requires_grad_() for s in states(4, seed=step)]
                leaves += [k, v]
                keys, values = cache.update(k, v, layer)
                total = total + (keys.sin().sum() * values.cos().mean())
        total.backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs)


def test_what_autograd_saved_is_not_written() -> None:
    """Queries alone need a gradient: the keys that it is computed from must outlive later steps without gradients."""
    cache = llmkern.KVCache()
    query = torch.randn(2, HEADS, 4, DIM, requires_grad=True)
    with torch.no_grad():
        update(cache, 4)
    keys, _ = cache.update(*states(1), 0)
    score = (query @ keys.transpose(2, 3)).sum()
    with torch.no_grad():
        cache.layers[0].crop(-3)
        update(cache, 5, seed=9)
    score.backward()
    torch.testing.assert_close(query.grad[0, 0, 0], keys[0, 0].sum(0))


@torch.no_grad()
def test_views_keep_their_tokens_while_the_cache_goes_on() -> None:
    cache = llmkern.KVCache()
    keys, _ = update(cache, 3)[0]
    before = keys.clone()
    for step in range(100):
        update(cache, 1, seed=step)
    assert torch.equal(keys, before)


def test_a_cache_made_in_inference_mode_goes_on_outside() -> None:
    got, expected = both(*HYBRID)
    with torch.inference_mode():
        update_both(got, expected, 5)
    with torch.no_grad():
        update_both(got, expected, 2)


@torch.no_grad()
def test_other_dtypes_and_batches_have_torch_cats_rules() -> None:
    got, expected = both("full_attention")
    update_both(got, expected, 3, dtype=torch.bfloat16)
    update_both(got, expected, 3)
    update_both(got, expected, 1, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="must match"):
        update(got, 1, batch=1)


@torch.no_grad()
def test_assigned_keys_and_values_are_what_it_holds() -> None:
    """As libraries do that thin a cache out."""
    got, expected = both(*HYBRID)
    update_both(got, expected, 5)
    for cache in (got, expected):
        for layer in cache.layers:
            layer.keys = layer.keys[:, :, :-1]
            layer.values = layer.values[:, :, :-1]
    assert torch.equal(got.layers[0].keys, expected.layers[0].keys)
    assert torch.equal(got.layers[0].values, expected.layers[0].values)
    assigned = got.layers[0].keys
    copied = assigned.clone()
    update_both(got, expected, 2)
    assert torch.equal(assigned, copied)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_kernel_may_write_the_buffers(dtype: str | None) -> None:
    got, expected = [llmkern.KVCache(config(*HYBRID), dtype=dtype) for _ in range(2)]
    got.early_initialization(2, HEADS, DIM, torch.float32, torch.device("cpu"))
    for step, tokens in enumerate((5, 1, 80, 1)):
        got.reserve(tokens)
        for i, layer in enumerate(got.layers):
            k, _ = states(tokens, seed=step)
            written = (k, k) if dtype is None else tuple(b for b in expected.layers[0]._encode(k, k))
            buffers = (layer.k_buffer, layer.v_buffer)
            if dtype is not None:
                buffers += (layer.k_scale_buffer, layer.v_scale_buffer)
            for buffer, values in zip(buffers, written, strict=True):
                buffer[:, :, layer.end : layer.end + tokens] = values
            layer.advance(tokens)
            expected.update(k, k, i)
    assert_same(got, expected)


def test_there_is_nothing_to_reserve_before_there_are_buffers() -> None:
    with pytest.raises(RuntimeError, match="no buffers yet"):
        KVLayer().reserve(1)


@torch.no_grad()
def test_offloading_a_layer_keeps_it() -> None:
    got, expected = both(*HYBRID)
    update_both(got, expected, 5)
    for layer in got.layers:
        layer.offload()
        layer.prefetch()
    assert_same(got, expected)


@torch.no_grad()
def test_layers_of_other_kinds_are_transformers_own() -> None:
    if TRANSFORMERS_4:
        pytest.skip("transformers 4 has no such layers in a DynamicCache")
    made = config("full_attention", "linear_attention", "hybrid", "full_attention")
    got, expected = llmkern.KVCache(made), DynamicCache(config=made)
    kinds = [type(layer) for layer in got.layers]
    assert kinds == [KVLayer, *[type(layer) for layer in expected.layers[1:3]], KVLayer]


def test_without_transformers_it_says_so() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'transformers' else real(name, *a)\n"
        "from llmkern import *\n"
        "import llmkern\n"
        "for cls in (llmkern.KVCache, llmkern.Int8Config):\n"
        "    try: cls()\n"
        "    except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("which is not installed") == 2
