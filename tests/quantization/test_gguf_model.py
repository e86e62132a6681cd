"""GGUF files as models that keep the file's blocks: each weight is what transformers makes of it, and so are logits."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import llmkern
from llmkern.cli import run
from llmkern.config import settings
from llmkern.nn import PackedEmbedding, PackedLinear, QuantizedLinear
from llmkern.quantization.formats.gguf import GGUF_TYPES
from llmkern.testing.compare import assert_same_bits
from llmkern.testing.gguf_write import llama_tensors

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


def add_tokenizer(writer: Any) -> None:
    """A vocabulary of printable characters and one merge."""
    tokens = [chr(33 + i) for i in range(VOCABULARY - 3)] + ["on", "\u0120", "<|end|>"]  # GPT-2's name of a space
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (VOCABULARY - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["o n"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(VOCABULARY - 1)
    writer.add_add_bos_token(False)


def write(path: Path, model: Any, kinds: dict[str, str], **extra: np.ndarray) -> Path:
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
    add_tokenizer(writer)
    for target, value in llama_tensors(model):
        if value.ndim == 1:
            writer.add_tensor(target, value)
            continue
        kind = next((kind for part, kind in kinds.items() if part in target), "Q8_0")
        if kind == "F32":
            writer.add_tensor(target, value)
        else:
            writer.add_tensor(target, blocks(value, kind), raw_dtype=gguf.GGMLQuantizationType[kind])
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


def test_from_pretrained_keeps_the_blocks_where_it_is_asked_to(file: Path, monkeypatch) -> None:
    options = {"gguf_file": file.name, "dtype": torch.bfloat16}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, quantization_config=llmkern.PackedConfig(), **options
    )
    assert type(model.model.layers[0].mlp.up_proj) is PackedLinear
    assert model.model.layers[0].mlp.up_proj.weight.dtype == model.model.norm.weight.dtype == torch.bfloat16
    plain = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **options)
    assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear
    monkeypatch.setattr(settings, "keep_packed", True)
    kept = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **options)
    assert_same_bits(list(kept.state_dict().values()), list(model.state_dict().values()))


def test_a_head_of_its_own_and_matrices_of_floats(tmp_path: Path) -> None:
    source = llama()
    source.config.tie_word_embeddings = False
    source.lm_head.weight = nn.Parameter(torch.randn(VOCABULARY, HIDDEN) * 0.02)
    path = write(tmp_path / "model.gguf", source, {"output.": "Q4_0", "ffn": "F32"})
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
        ValueError, match="^save_pretrained: model.embed_tokens is Q4_1: a vocabulary in these blocks has no place"
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


def test_the_command_line_reads_the_header_before_any_library_does(file: Path, tmp_path: Path, capsys) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(truncated(file.read_bytes()))
    assert run(["check", str(bad)]) == 2
    *_, message = capsys.readouterr().err.splitlines()
    assert message.startswith(f"llmkern: {bad}: tensor ")
    assert "expected within the file's" in message


def test_a_missing_file_and_a_wrong_size(file: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist, expected a .gguf file"):
        llmkern.load(tmp_path / "none.gguf")


@pytest.fixture(scope="module")
def by_llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that llama.cpp itself quantized, to Q4_K, Q6_K and Q5_0."""
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = tmp_path_factory.mktemp("llama.cpp")
    source = write(folder / "f32.gguf", llama(), dict.fromkeys(("attn", "ffn", "token"), "F32"))
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, 1
    target = folder / "model.gguf"
    assert not llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options))
    return target


@torch.no_grad()
def test_llama_cpp_says_the_same_of_its_own_file(by_llama_cpp: Path) -> None:
    import llama_cpp

    theirs = llama_cpp.Llama(str(by_llama_cpp), n_ctx=32, logits_all=True, n_threads=1, verbose=False)
    ids = (IDS[0] % VOCABULARY).tolist()
    theirs.eval(ids)
    expected = torch.from_numpy(np.array(theirs.scores[: len(ids)]))
    model = llmkern.load(by_llama_cpp)
    got = model(torch.tensor([ids])).logits[0]
    assert {"Q4_K", "Q6_K"} <= {row.action for row in llmkern.report(model).quantization}
    assert (got - expected).norm() < 0.02 * expected.norm()


def test_the_command_line_takes_a_file_alone(by_llama_cpp: Path, capsys) -> None:
    """Config and tokenizer come from the file's own metadata."""
    path = str(by_llama_cpp)
    assert run(["generate", path, "--prompt", "one two", "--max-new-tokens", "3", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["prompt_tokens"], answer["tokens"]) == (len("one two") - 1, 3)
    run(["check", path, "--tokens", "48", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"]["gguf"] == pytest.approx(found["perplexity"]["original"], rel=0.01)
    assert found["bytes"][1] < 0.2 * found["bytes"][0]
