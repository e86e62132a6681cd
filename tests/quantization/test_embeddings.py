"""Embeddings and output heads in int8: tied ones share their codes, through saving, loading and the way back."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import llmkern
from llmkern.nn import Int8Embedding, Int8Linear
from llmkern.quantization import dequantize_, load_, quantize_
from llmkern.testing.compare import assert_same_bits

IDS = torch.tensor([[0, 3, 3], [5, 1, 0]])


def table(**options) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(6, 16, **options)


def rows_of(model: nn.Module) -> dict:
    return {row.path: row for row in llmkern.report(model).quantization}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_embedding_to_half_a_step(dtype: torch.dtype) -> None:
    module = table(padding_idx=0).to(dtype)
    int8 = Int8Embedding.from_embedding(module)
    got, wanted = int8(IDS), module(IDS)
    assert got.dtype == dtype
    step = wanted.float().abs().amax(-1, keepdim=True) / 127
    rounding = torch.finfo(dtype).eps * wanted.float().abs()
    assert bool(((got.float() - wanted.float()).abs() <= step / 2 * 1.001 + rounding).all())
    assert not got[0, 0].any()  # the padding row
    assert int8.codes.dtype == torch.int8
    assert int8.weight_scale.shape == (6, 1)
    assert_same_bits(int8.to_embedding()(IDS), got.detach())


def test_conversions_change_the_result_and_never_the_codes() -> None:
    int8 = Int8Embedding.from_embedding(table())
    codes, scale = int8.codes.clone(), int8.weight_scale.clone()
    assert int8.half()(IDS).dtype == torch.float16
    assert int8.to(torch.bfloat16).dtype == torch.bfloat16
    assert_same_bits(int8.codes.detach(), codes)
    assert_same_bits(int8.weight_scale, scale)
    assert "dtype=torch.bfloat16" in repr(int8)


def test_the_state_comes_back_and_a_wrong_one_is_refused() -> None:
    int8, other = Int8Embedding.from_embedding(table()), Int8Embedding(6, 16)
    assert not other(IDS).any()
    buffer = io.BytesIO()
    torch.save(int8.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    assert_same_bits(other(IDS), int8(IDS))
    before = other(IDS)
    for wrong, message in [
        ({**int8.state_dict(), "weight": table().weight}, r"weight is torch.float32, expected torch.int8"),
        ({"weight": int8.codes}, r"weight_scale is missing"),
        ({**int8.state_dict(), "weight_scale": torch.full((6, 1), -1.0)}, r"NaN, infinite or negative"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            other.load_state_dict(wrong)
        assert_same_bits(other(IDS), before)


def test_what_does_more_than_look_rows_up_is_refused() -> None:
    with pytest.raises(ValueError, match="max_norm is 1.0"):
        Int8Embedding.from_embedding(table(max_norm=1.0))
    with pytest.raises(TypeError, match="module is a Linear, expected nn.Embedding"):
        Int8Embedding.from_embedding(nn.Linear(2, 2))
    module = table()
    module.weight.data[2, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        Int8Embedding.from_embedding(module)


def test_tied_head_and_embedding_share_their_codes(tiny_llama, ids) -> None:
    wanted = tiny_llama(ids).logits
    quantize_(tiny_llama)
    embedding, head = tiny_llama.model.embed_tokens, tiny_llama.lm_head
    assert (type(embedding), type(head)) == (Int8Embedding, Int8Linear)
    assert embedding.weight is head.weight
    assert head.scheme == "w8a16"
    assert not rows_of(tiny_llama)["lm_head"].smoothed
    assert rows_of(tiny_llama)["lm_head"].reason == "it is the output head"
    assert rows_of(tiny_llama)["model.embed_tokens"].reason == "it shares the weight of lm_head"
    assert (tiny_llama(ids).logits - wanted).norm() < 0.02 * wanted.norm()
    quantized = tiny_llama(ids).logits
    for other in (copy.deepcopy(tiny_llama), tiny_llama.bfloat16().float()):
        other.tie_weights()
        assert other.lm_head.weight is other.model.embed_tokens.weight
        assert (other(ids).logits - quantized).norm() < 0.02 * quantized.norm()


def test_the_way_back_ties_again(tiny_llama, ids) -> None:
    quantize_(tiny_llama)
    quantized = tiny_llama(ids).logits
    dequantize_(tiny_llama)
    assert type(tiny_llama.model.embed_tokens) is nn.Embedding
    assert tiny_llama.lm_head.weight is tiny_llama.model.embed_tokens.weight
    assert (tiny_llama(ids).logits - quantized).norm() < 0.02 * quantized.norm()
    tiny_llama.resize_token_embeddings(140)
    assert tiny_llama.lm_head.weight is tiny_llama.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded(tied: bool, tiny_llama, ids, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny_llama
    if not tied:
        config = copy.deepcopy(tiny_llama.config)
        config.tie_word_embeddings = False
        torch.manual_seed(1)
        model = transformers.LlamaForCausalLM(config).eval()
    quantize_(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    if not tied:
        assert rows_of(model)["model.embed_tokens"].reason == "its rows are looked up"
    model.save_pretrained(tmp_path)
    empty = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(tmp_path)).eval()
    loaded = load_(empty, tmp_path)
    assert_same_bits(loaded(ids).logits, model(ids).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    pytest.importorskip("compressed_tensors")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (stock(ids).logits - model(ids).logits).norm() < 0.02 * stock(ids).logits.norm()


def test_what_is_left_is_left_together_and_says_why(tiny_llama) -> None:
    for arguments, head, embedding in [
        ({"skip": ("lm_head",)}, "skip names 'lm_head'", "its weight is shared with lm_head, which is left"),
        (
            {"skip": ("embed_tokens",)},
            "its weight is shared with model.embed_tokens: skip names 'embed_tokens'",
            "skip names 'embed_tokens'",
        ),
        (
            {"filter_fn": lambda module, path: path != "lm_head"},
            "filter_fn returned False",
            "its weight is shared with lm_head, which is left",
        ),
    ]:
        model = copy.deepcopy(tiny_llama)
        rows = rows_of(quantize_(model, **arguments))
        assert rows["lm_head"].reason == head
        assert rows["model.embed_tokens"].reason == embedding
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.dtype == torch.float32


def test_scaled_embeddings_are_left_with_their_heads() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=16
    )
    model = transformers.Gemma3ForCausalLM(config).eval()
    rows = rows_of(quantize_(model))
    kind = type(model.model.embed_tokens).__name__
    assert rows["model.embed_tokens"].reason == f"a {kind} may do more than nn.Embedding does"
    assert (
        rows["lm_head"].reason
        == f"its weight is shared with model.embed_tokens: a {kind} may do more than nn.Embedding does"
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_embeddings_of_models_without_a_head_and_positions_stay() -> None:
    transformers = pytest.importorskip("transformers")
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    ).eval()
    quantize_(gpt2)
    assert type(gpt2.transformer.wte) is Int8Embedding
    assert type(gpt2.transformer.wpe) is nn.Embedding
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    bert = transformers.BertModel(transformers.BertConfig(num_attention_heads=2, **small)).eval()
    quantize_(bert)
    assert type(bert.embeddings.word_embeddings) is nn.Embedding
