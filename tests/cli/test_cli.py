"""The command line: what it prints, what it returns, and one line for every bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import llmkern
from llmkern import dispatch, registry
from llmkern.cli.output import print_json
from llmkern.config import settings


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """A tiny language model with a tokenizer of single bytes."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=None,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=letters[0]).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    """A tiny encoder without a tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> dict[str, str]:
    """An encoder and decoder of text, and a model of images."""
    shape = {"num_layers": 2, "num_heads": 2, "pad_token_id": 0, "decoder_start_token_id": 0}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=256, d_model=64, d_kv=32, d_ff=96, **shape))
    vit = ViTModel(ViTConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1))
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in ("t5", "vit")}
    t5.save_pretrained(folders["t5"])
    vit.save_pretrained(folders["vit"])
    return folders


def test_info(llmkern_) -> None:
    status, out, _ = llmkern_("info", "--json")
    assert status == 0
    assert set(json.loads(out)["backends"]) >= {"cuda", "triton", "cpu", "torch", "reference"}
    text = llmkern_("info")[1]
    assert "Hardware" in text
    assert ("CUDA kernels" in text) == bool(json.loads(out)["kernels"])


class TestCheck:
    KEYS = (
        *("model", "swapped", "left", "accuracy", "perplexity", "divergence", "bytes", "speed"),
        *("restored_bit_equal", "verdict"),
    )

    def test_language_model(self, llmkern_, llama, tmp_path) -> None:
        saved = tmp_path / "folder" / "check.json"
        status, out, _ = llmkern_(
            "check",
            llama,
            "--quantize",
            "int8",
            "--kv-cache",
            "int8",
            "--tokens",
            "256",
            "--json",
            "--save",
            str(saved),
        )
        found = json.loads(out)
        assert tuple(found) == self.KEYS
        assert tuple(found["accuracy"]) == ("max_abs", "rel", "kl", "top1")
        assert tuple(found["perplexity"]) == ("original", "optimized", "int8", "int8 cache")
        assert found["perplexity"]["int8 cache"] == pytest.approx(found["perplexity"]["original"], rel=0.02)
        assert found["perplexity"]["int8 cache"] != found["perplexity"]["optimized"]
        assert (status, found["verdict"], found["restored_bit_equal"]) == (0, True, True)
        assert {row["kind"] for row in found["swapped"]} >= {"norm", "attention"}
        assert found["perplexity"]["optimized"] == pytest.approx(found["perplexity"]["original"], rel=1e-4)
        assert found["perplexity"]["int8"] == pytest.approx(found["perplexity"]["original"], rel=0.02)
        content = json.loads(saved.read_text())
        assert content["result"] == found
        environment = llmkern.info().to_dict()
        del environment["library"]["path"]
        assert content["environment"] == environment
        assert content["command"] == f"llmkern check {llama} --quantize int8 --kv-cache int8 --tokens 256 --dtype auto"

    @pytest.mark.parametrize("scheme", ["int4", "int8-block"])
    def test_fewer_bits(self, llmkern_, llama, scheme) -> None:
        status, out, _ = llmkern_("check", llama, "--quantize", scheme, "--tokens", "64")
        assert status == 0
        for line in ("mean KL, nats", "same top token", "prefill, tokens/s", f"│ {scheme}"):
            assert line in out
        assert "int4" in out or scheme == "int8-block"

    def test_encoder_without_a_tokenizer(self, llmkern_, bert) -> None:
        status, out, err = llmkern_("check", bert, "--dtype", "bfloat16", "--json")
        found = json.loads(out)
        assert (status, found["verdict"]) == (0, True)
        assert found["perplexity"] == {"original": None, "optimized": None}
        assert "has no tokenizer" in err

    def test_encoder_and_decoder(self, llmkern_, others, llama) -> None:
        PreTrainedTokenizerFast.from_pretrained(llama).save_pretrained(others["t5"])
        status, out, err = llmkern_("check", others["t5"], "--quantize", "int8", "--json")
        found = json.loads(out)
        assert (status, found["verdict"], found["perplexity"]["int8"]) == (0, True, None)
        assert "int8 is judged by perplexity" in err

    def test_a_wrong_kernel_is_found(self, llmkern_, llama) -> None:
        backend = dispatch.register("test-wrong", priority=900)
        before = dispatch.implementations("rms_norm")
        try:

            @llmkern.implements("rms_norm", backend)
            def rms_norm(x, weight, bias, eps, weight_offset):
                return dispatch.implementation("rms_norm", "torch").fn(x, weight, bias, eps, weight_offset) * 1.01

            status, out, _ = llmkern_("check", llama, "--tokens", "64", "--json")
            text = llmkern_("check", llama, "--tokens", "64")[1]
        finally:
            dispatch.replace_implementations("rms_norm", before)
            del registry._BACKENDS["test-wrong"]
        found = json.loads(out)
        assert (status, found["verdict"], found["restored_bit_equal"]) == (1, False, True)
        assert "FAIL  outside the rule" in text


class TestGenerate:
    def test_streams_what_the_model_generates(self, llmkern_, llama) -> None:
        status, out, err = llmkern_("generate", llama, "--prompt", "Once", "--max-new-tokens", "6")
        assert status == 0
        assert "6 tokens" in err
        status, text, _ = llmkern_("generate", llama, "--prompt", "Once", "--max-new-tokens", "6", "--json")
        found = json.loads(text)
        assert out == found["text"] + "\n"
        assert (found["tokens"], found["prompt_tokens"], found["variant"]) == (6, 4, "optimized")
        assert found["ttft_ms"] > 0
        assert found["tokens_per_second"] > 0
        assert found["peak_memory_bytes"] > 2**20

    def test_untouched_and_optimized_agree(self, llmkern_, llama) -> None:
        call = ("generate", llama, "--prompt", "Once", "--max-new-tokens", "8", "--json")
        texts = [json.loads(llmkern_(*call, *flags)[1])["text"] for flags in ((), ("--no-optimize",))]
        assert texts[0] == texts[1]

    def test_int8(self, llmkern_, llama) -> None:
        flags = ("--max-new-tokens", "2", "--quantize", "int8", "--json")
        found = json.loads(llmkern_("generate", llama, "--prompt", "Once", *flags)[1])
        assert found["variant"] == "optimized + int8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "No such command"),
        (["info", "--nosuch"], "No such option"),
        (["--backend", "nosuch", "info"], "--backend: unknown backend 'nosuch'; there are cuda"),
        (["why", "nosuch", "--shape", "1"], "unknown op 'nosuch'; there are add_layer_norm"),
        (["why", "gelu"], "expected rows,hidden"),
        (["why", "gelu", "--shape", "1,2,3"], "shape of gelu is rows,hidden, got 1,2,3"),
        (["why", "gelu", "--shape", "1,x"], "expected rows,hidden as whole numbers"),
        (["why", "gelu", "--shape", "1,2", "--dtype", "int3"], "--dtype is 'int3', expected float32"),
        (["why", "gelu", "--shape", "1,2", "--device", "npu"], "device is 'npu', expected cpu, cuda or tpu"),
        (["why", "gelu", "--shape", "1,2", "--capability", "9.0"], "capability is for cuda devices"),
        (["why", "gelu", "--shape", "1,2", "--device", "cuda", "--capability", "x"], "expected major.minor"),
        (["why", "gelu", "--shape", "1,2", "--arg", "x"], "expected NAME=VALUE"),
        (["why", "gelu", "--shape", "1,2", "--arg", "x=1"], "gelu has no argument 'x'; there are approximate"),
        (["why", "gelu", "--shape", "1,2", "--arg", "approximate=x"], "approximate is 'x', expected 'none'"),
        (["why", "attention", "--shape", "1,3,2,4,4,8"], "q has 3 heads, expected a multiple"),
        (["why", "attention", "--shape", "1,2,2,4,4,8", "--arg", "causal=maybe"], "expected true or false"),
        (["why", "attention", "--shape", "1,2,2,4,4,8", "--arg", "window=x"], "expected a whole number or"),
        (["why", "rms_norm", "--shape", "1,8", "--arg", "eps=-1"], "eps is -1.0, expected"),
        (["check", "/no/such/model"], "MODEL /no/such/model does not exist"),
        (["check", "demo:nosuch"], "expected demo:smollm2 or demo:smollm2-offgrid or demo:minilm"),
        (["check", "{empty}"], "has no config.json"),
        (["check", "{corrupt}"], "cannot load MODEL"),
        (["check", "{incomplete}"], "lacks 1 weights, model.norm.weight among them"),
        (["check", "{llama}", "--quantize", "int3"], "--quantize is 'int3', expected int8, int8-block, int4, int4-g32"),
        (["check", "{llama}", "--tokens", "1"], "--tokens is 1, expected at least 2"),
        (["check", "{llama}", "--device", "tpu"], "--device is 'tpu', expected cpu, cuda or auto"),
        (["check", "{vit}"], "takes pixel_values; check compares models of text"),
        (["generate", "{bert}", "--prompt", "x"], "is a BertModel, which does not generate text"),
        (["generate", "{llama}", "--prompt", ""], "--prompt is empty"),
        (["generate", "{llama}", "--prompt", "x", "--max-new-tokens", "0"], "expected at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_status_2(llmkern_, llama, bert, others, tmp_path, arguments, message) -> None:
    folders = {"llama": llama, "bert": bert, "empty": str(tmp_path), **others}
    for name in ("corrupt", "incomplete"):
        if f"{{{name}}}" in arguments:
            folders[name] = str(damaged(llama, tmp_path, name))
    status, out, err = llmkern_(*[part.format(**folders) for part in arguments])
    *progress, line = err.splitlines()
    assert status == 2
    assert out == ""
    assert line.startswith("llmkern: ")
    assert message in line
    assert all(text.startswith(("loading", "comparing", "warming")) for text in progress)


def damaged(llama: str, tmp_path, how: str):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / how
    model = LlamaForCausalLM.from_pretrained(llama)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    if how == "corrupt":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        weights = load_file(file)
        del weights["model.norm.weight"]
        save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "ops", "--op", "gelu", "--op", "swiglu"), "--op is given 2 times, expected once"),
        (("why", "gelu", "--shape", "2,4", "--device", "cpu", "--device", "cuda"), "--device is given 2 times"),
    ],
)
def test_an_option_given_twice_is_refused(llmkern_, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = llmkern_(*arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert llmkern_("why", "attention", "--shape", "1,2,2,8,8,64", "--arg", "causal=true", "--arg", "window=4")[0] == 0


def test_a_wrong_environment_variable_is_one_line_of_a_command() -> None:
    environment = {**os.environ, "LLMKERN_STRICT": "yes"}
    command = [sys.executable, "-m", "llmkern", "info"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (2, "llmkern: LLMKERN_STRICT is 'yes', expected 0 or 1\n")


def test_a_failure_of_llmkern_itself_is_status_3(llmkern_, monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("llmkern.cli.why.decide", broken)
    status, _, err = llmkern_("why", "gelu", "--shape", "2,8")
    assert (status, err) == (3, "llmkern: AssertionError: a bug; LLMKERN_DEBUG=1 shows where\n")
    settings.debug = True
    status, _, err = llmkern_("why", "gelu", "--shape", "2,8")
    assert status == 3
    assert "Traceback" in err
    assert err.endswith("llmkern: AssertionError: a bug\n")


@pytest.mark.parametrize("arguments", [(), ("bench",)], ids=["llmkern", "llmkern bench"])
def test_without_a_command_the_help_is_printed_as_it_is(llmkern_, arguments: tuple[str, ...]) -> None:
    status, out, err = llmkern_(*arguments)
    assert (status, err) == (2, "")
    assert out == llmkern_(*arguments, "--help")[1]


def test_version(llmkern_) -> None:
    assert llmkern_("--version") == (0, f"llmkern {llmkern.__version__}\n", "")
    assert llmkern.__version__[0].isdigit()


def test_json_has_no_nan(capsys) -> None:
    print_json({"a": float("nan"), "b": [float("inf"), 1.0]})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.0]}


def test_python_m_llmkern() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmkern", "why", "gelu", "--shape", "x"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "llmkern: --shape is 'x', expected rows,hidden as whole numbers\n"


def test_help_teaches(llmkern_) -> None:
    for command in ("info", "why", "check", "generate", "demo"):
        status, out, _ = llmkern_(command, "--help")
        assert status == 0
        assert f"llmkern {command}" in out.split("Usage:")[1].split("\n", 1)[1]  # an example below the usage line
        assert "--json" in out
