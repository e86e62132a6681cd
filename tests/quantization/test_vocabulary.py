"""transformers' resize_token_embeddings and tie_weights on int8 models: they work, or change nothing and say why."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import llmkern
from llmkern.nn import Int8Embedding, Int8Linear, PackedEmbedding, PackedLinear
from llmkern.quantization import dequantize_, load_, quantize_

hf = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:llmkern leaves:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*tied weights.*:UserWarning"),
]

SIZES = [140, 100, 128, None]


def untied(model: nn.Module) -> Any:
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(torch.randn(128, 32))
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_tokens_that_stay_keep_their_codes_in_groups(tied: bool, size: int | None, tiny_llama, ids) -> None:
    model = quantize_(tiny_llama if tied else untied(tiny_llama), "int6")
    ids = ids % 100
    before, head = model(ids).logits, model.lm_head
    model.resize_token_embeddings(size)
    rows = size or 128
    table = model.get_input_embeddings()
    assert (type(table), type(model.lm_head)) == (PackedEmbedding if tied else Int8Embedding, PackedLinear)
    assert (table.weight is model.lm_head.weight) == tied
    assert (table.num_embeddings, model.lm_head.out_features, model.config.vocab_size) == (rows, rows, rows)
    assert (model.lm_head is head) == (rows == 128)
    after = model(ids).logits
    kept = min(rows, 128)
    assert after.shape[-1] == rows
    assert torch.equal(after[..., :kept], before[..., :kept])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_tokens_that_stay_give_the_same_bits(tied: bool, dtype: torch.dtype, size: int | None, tiny_llama, ids) -> None:
    model = (tiny_llama if tied else untied(tiny_llama)).to(dtype)
    quantize_(model)
    ids = ids % 100
    before, head = model(ids).logits, model.lm_head
    model.resize_token_embeddings(size)
    rows = size or 128
    table = model.get_input_embeddings()
    assert (type(table), type(model.lm_head)) == (Int8Embedding, Int8Linear)
    assert (table.dtype, model.lm_head.dtype) == (dtype, dtype)
    assert (table.weight is model.lm_head.weight) == tied
    assert (table.num_embeddings, model.lm_head.out_features, model.config.vocab_size) == (rows, rows, rows)
    assert (model.lm_head.scheme, model.lm_head.weight.requires_grad) == ("w8a16", False)
    assert (model.lm_head is head) == (rows == 128)
    after = model(ids).logits
    kept = min(rows, 128)
    assert after.dtype == dtype
    assert after.shape[-1] == rows
    assert torch.equal(after[..., :kept], before[..., :kept])


@pytest.mark.parametrize("scheme", ["int8", "int6"])
@torch.no_grad()
def test_new_tokens_are_those_of_the_floating_point_model(scheme: str, tiny_llama) -> None:
    other = copy.deepcopy(tiny_llama)
    quantize_(tiny_llama, scheme)
    for model in (tiny_llama, other):
        torch.manual_seed(3)
        model.resize_token_embeddings(200)
    new = torch.arange(128, 200)
    got, wanted = (model.get_input_embeddings()(new) for model in (tiny_llama, other))
    assert (got - wanted).norm() < 0.05 * wanted.norm()  # of other old ones, as these are rounded
    assert got.std() > 0


@torch.no_grad()
def test_a_head_alone_that_is_int8(tiny_llama, ids) -> None:
    model = untied(tiny_llama)
    quantize_(model, skip=["embed_tokens"])
    before = model(ids).logits
    model.resize_token_embeddings(150)
    assert (type(model.get_input_embeddings()), type(model.lm_head)) == (nn.Embedding, Int8Linear)
    assert torch.equal(model(ids).logits[..., :128], before)


@torch.no_grad()
def test_an_embedding_in_several_places() -> None:
    torch.manual_seed(0)
    config = hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    model = hf.T5ForConditionalGeneration(config).eval()
    quantize_(model)
    ids = torch.arange(10)[None]
    before = model(input_ids=ids, decoder_input_ids=ids).logits
    table = model.shared
    model.resize_token_embeddings(70)
    assert model.shared is model.encoder.embed_tokens is model.decoder.embed_tokens
    assert model.shared is not table
    assert type(model.shared) is type(table)
    assert torch.equal(model(input_ids=ids, decoder_input_ids=ids).logits[..., :64], before)


@torch.no_grad()
def test_an_optimized_model(tiny_llama, ids) -> None:
    quantize_(tiny_llama)
    llmkern.optimize_(tiny_llama)
    before = tiny_llama(ids).logits
    tiny_llama.resize_token_embeddings(140)
    assert torch.equal(tiny_llama(ids).logits[..., :128], before)
    llmkern.restore_(tiny_llama)
    torch.testing.assert_close(tiny_llama(ids).logits[..., :128], before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_saved_and_loaded(tiny_llama, ids, tmp_path) -> None:
    quantize_(tiny_llama)
    tiny_llama.resize_token_embeddings(140)
    tiny_llama.save_pretrained(tmp_path)
    loaded = load_(hf.LlamaForCausalLM(hf.LlamaConfig.from_pretrained(tmp_path)).eval(), tmp_path)
    assert torch.equal(loaded(ids).logits, tiny_llama(ids).logits)
    loaded.resize_token_embeddings(150)
    assert torch.equal(loaded(ids).logits[..., :140], tiny_llama(ids).logits)


@torch.no_grad()
def test_copies_resize_themselves(tiny_llama, ids) -> None:
    quantize_(tiny_llama)
    before = tiny_llama(ids).logits
    for other in (copy.deepcopy(tiny_llama), pickle.loads(pickle.dumps(tiny_llama))):
        other.resize_token_embeddings(140)
        assert torch.equal(other(ids).logits[..., :128], before)
        assert tiny_llama.get_input_embeddings().num_embeddings == 128
    gone = weakref.ref(tiny_llama)
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        copied = copy.deepcopy(tiny_llama)
        gone = weakref.ref(copied)
        del copied
        assert gone() is None  # without the garbage collector
    finally:
        if enabled:
            gc.enable()


def test_a_failure_changes_nothing(tiny_llama, ids, unchanged, monkeypatch) -> None:
    quantize_(tiny_llama)
    check = unchanged(tiny_llama)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(Int8Linear, "from_linear", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        tiny_llama.resize_token_embeddings(140)
    check()
    assert tiny_llama.vocab_size == 128
    monkeypatch.undo()
    assert tiny_llama.resize_token_embeddings(140) is tiny_llama.get_input_embeddings()


def test_back_in_floating_point_the_methods_are_transformers_own(tiny_llama) -> None:
    own = tiny_llama.resize_token_embeddings, tiny_llama.tie_weights
    tiny_llama._keys_to_ignore_on_save = {"a key"}
    quantize_(tiny_llama)
    dequantize_(tiny_llama)
    assert (tiny_llama.resize_token_embeddings, tiny_llama.tie_weights) == own
    assert tiny_llama._keys_to_ignore_on_save == {"a key"}
    tiny_llama.resize_token_embeddings(140)
    assert type(tiny_llama.lm_head) is nn.Linear


@torch.no_grad()
def test_tied_later_codes_bring_their_scales(tiny_llama, ids) -> None:
    model = untied(tiny_llama)
    quantize_(model)
    wanted = copy.deepcopy(model)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    head = nn.Linear(32, 128, bias=False)
    head.weight.copy_(wanted.get_input_embeddings().dequantized_weight())
    wanted.lm_head = head
    torch.testing.assert_close(model(ids).logits, wanted(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("skip", ["embed_tokens", "lm_head"])
def test_one_in_floating_point_is_not_tied_to_one_in_int8(skip: str, tiny_llama, ids, unchanged) -> None:
    model = untied(tiny_llama)
    quantize_(model, skip=[skip])
    model.config.tie_word_embeddings = True
    check, before = unchanged(model), model(ids).logits
    with pytest.raises(
        ValueError, match=r"tie_weights: lm_head and the layer that it would be tied to are not both quantized"
    ):
        model.tie_weights()
    check()
    assert torch.equal(model(ids).logits, before)
