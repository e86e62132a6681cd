"""GGUF files as models that keep the file's blocks: each weight is what transformers makes of it, and so are logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import llmkern
from llmkern.nn import PackedEmbedding, PackedLinear, QuantizedLinear
from llmkern.quantization.formats.gguf import GGUF_TYPES
from llmkern.testing.compare import assert_same_bits

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.quantizers.quantizer_gguf")

IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
HIDDEN, MIDDLE, VOCABULARY = 256, 512, 96
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q8_0")
"""What the gguf package quantizes to; of other types blocks are drawn."""


def blocks(weight: np.ndarray, kind: str) -> np.ndarray:
    """The weight in this type; of K-quants others, of about its size."""
    if kind in QUANTIZED:
        return gguf.quantize(weight, gguf.GGMLQuantizationType[kind])
    form = GGUF_TYPES[kind]
    rows, columns = weight.shape
    raw = np.random.default_rng(rows).integers(0, 256, (rows, columns // form.columns, form.nbytes), dtype=np.uint8)
    small = np.frombuffer(np.float16(2e-5).tobytes(), np.uint8)
    for place in {"Q4_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,)}[kind]:
        raw[..., place : place + 2] = small
    return raw.reshape(rows, -1)


def write(path: Path, model: Any, kinds: dict[str, str], *, tied: bool = True, **extra: np.ndarray) -> Path:
    """A Llama as llama.cpp's converter writes it.  kinds: types by a part of a tensor's name; others are Q8_0."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    named = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        stem, _, suffix = name.rpartition(".")
        target, value = f"{named.get_name(stem)}.{suffix}", tensor.numpy()
        for part, heads in (("attn_q", config.num_attention_heads), ("attn_k", config.num_key_value_heads)):
            if f".{part}." in target:  # its rows in pairs that are rotated together
                value = value.reshape(heads, 2, -1, HIDDEN).swapaxes(1, 2).reshape(value.shape)
        if value.ndim == 1:
            writer.add_tensor(target, value)
            continue
        kind = next((kind for part, kind in kinds.items() if part in target), "Q8_0")
        data = np.ascontiguousarray(value)
        if kind == "F32":
            writer.add_tensor(target, data)
        else:
            writer.add_tensor(target, blocks(data, kind), raw_dtype=gguf.GGMLQuantizationType[kind])
    for name, value in extra.items():
        writer.add_tensor(name.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama(**changes: Any):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=MIDDLE,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=64,
        **changes,
    )
    return transformers.LlamaForCausalLM(config).eval()


KINDS = {"attn_v": "Q6_K", "attn": "Q4_K", "ffn_down": "Q4_0", "ffn_up": "IQ4_XS", "ffn": "Q5_0", "token_embd": "Q4_1"}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf", llama(), KINDS)


def stock(path: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS % VOCABULARY).logits


def test_every_weight_is_the_file_s_and_none_is_inflated(file: Path) -> None:
    model, expected = llmkern.load(file), stock(file)
    actions = {row.path.rpartition(".")[2]: row.action for row in llmkern.report(model).quantization}
    assert actions == {
        **{"q_proj": "Q4_K", "k_proj": "Q4_K", "v_proj": "Q6_K", "o_proj": "Q4_K", "embed_tokens": "Q4_1"},
        **{"gate_proj": "Q5_0", "up_proj": "IQ4_XS", "down_proj": "Q4_0", "lm_head": "Q4_1"},
    }
    assert type(model.lm_head) is PackedLinear
    assert type(model.model.embed_tokens) is PackedEmbedding
    assert model.lm_head.codes is model.model.embed_tokens.codes
    assert sum(t.nbytes for t in model.parameters()) < 0.2 * sum(t.nbytes for t in expected.parameters())
    assert not model.training
    assert not any(module.training for module in model.modules())
    got = llmkern.dequantize_(model).state_dict()
    for name, value in expected.state_dict().items():
        assert_same_bits(got[name], value)


def test_logits_differ_by_the_rounding_of_activations_alone(file: Path) -> None:
    model, expected = llmkern.load(file), logits(stock(file))
    assert (logits(model) - expected).norm() < 0.02 * expected.norm()
    llmkern.optimize_(model)
    assert (logits(model) - expected).norm() < 0.02 * expected.norm()
    answer = model.generate(IDS[:1] % VOCABULARY, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert answer.shape == (1, IDS.shape[1] + 3)


def test_from_pretrained_keeps_the_blocks_where_it_is_asked_to(file: Path) -> None:
    from llmkern.quantization.gguf_quantizer import GgufConfig

    options = {"gguf_file": file.name, "dtype": torch.bfloat16}
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, quantization_config=GgufConfig(), **options)
    assert type(model.model.layers[0].mlp.up_proj) is PackedLinear
    assert model.model.layers[0].mlp.up_proj.weight.dtype == model.model.norm.weight.dtype == torch.bfloat16
    plain = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **options)
    assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear


def test_a_head_of_its_own_and_matrices_of_floats(tmp_path: Path) -> None:
    source = llama()
    source.config.tie_word_embeddings = False
    source.lm_head.weight = nn.Parameter(torch.randn(VOCABULARY, HIDDEN) * 0.02)
    path = write(tmp_path / "model.gguf", source, {"output.": "Q4_0", "ffn": "F32"}, tied=False)
    model, expected = llmkern.load(path), stock(path)
    assert model.lm_head.kind == "Q4_0"
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    got = llmkern.dequantize_(model).state_dict()
    for name, value in expected.state_dict().items():
        assert_same_bits(got[name], value)


def test_factors_of_frequencies_divide_them(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 32, dtype=np.float32)
    path = write(tmp_path / "model.gguf", llama(), {}, rope_freqs__weight=factors)
    model, plain = llmkern.load(path), llama()
    rotary = plain.model.rotary_emb.inv_freq / torch.from_numpy(factors)
    assert_same_bits(model.model.rotary_emb.inv_freq, rotary)


def test_what_checkpoints_have_no_place_for_is_said(file: Path, tmp_path: Path) -> None:
    model = llmkern.load(file)
    with pytest.raises(
        ValueError, match="^save_pretrained: model.embed_tokens is Q4_1: an embedding in blocks has no place"
    ):
        model.save_pretrained(tmp_path)
    assert all(isinstance(m, QuantizedLinear) for m in model.modules() if isinstance(m, nn.Linear))


def truncated(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def infinite(raw: bytes) -> bytes:
    half = np.float16(2e-5).tobytes()
    return raw.replace(half + half, np.float16(np.inf).tobytes() + half, 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "ends at byte .*, expected within the file's"),
        (infinite, "tensor blk.0.attn.* has scales that are NaN or infinite"),
        (lambda raw: b"GGUX" + raw[4:], "does not begin with GGUF"),
        (lambda raw: raw.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"), "tensor blk.0.ffn_xx.weight"),
    ],
)
def test_a_hostile_file_is_one_line(file: Path, tmp_path: Path, damage, message: str) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        llmkern.load(bad)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_wrong_size(file: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist, expected a .gguf file"):
        llmkern.load(tmp_path / "none.gguf")


@torch.no_grad()
def test_llama_cpp_says_the_same(file: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    try:
        theirs = llama_cpp.Llama(str(file), n_ctx=32, logits_all=True, verbose=False)
    except ValueError:
        pytest.skip("llama.cpp asks for a tokenizer, which this file does not have")
    ids = (IDS[0] % VOCABULARY).tolist()
    theirs.eval(ids)
    expected = torch.from_numpy(np.array(theirs.scores[: len(ids)]))
    got = llmkern.load(file)(torch.tensor([ids])).logits[0]
    assert (got - expected).norm() < 0.02 * expected.norm()
