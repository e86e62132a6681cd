from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, T5Config

from llmkern.bench import variants as variants_module
from llmkern.bench.peer import Peer, Unsupported, variants
from llmkern.bench.run_models import Chosen, Plan, at_once, choose, run_models
from llmkern.bench.schema import Result, Row
from llmkern.bench.tables import markdown
from llmkern.bench.variants import Spec, config_names, kind_of, loaded_model, published_config
from llmkern.bench.worker import Worker
from llmkern.bench.workers import Failed, WorkerProcess
from llmkern.cli import run
from llmkern.cli.models import Loaded

SPEC = Spec("tiny", None, "causal", "float32", "cpu", 1, 8, 4, 1)
PLAN = Plan("tiny", SPEC, list(range(8)), 0, 3, {"batch": 1})


class FakeWorker:
    """Answers at once; its speed and failures are its variant's name: "slow" takes twice as long."""

    order: list[str] = []

    def __init__(self, threads: int) -> None:
        self.variant, self.runs, self.released = "", 0, False

    def begin(self, do: str, **arguments: Any) -> None:
        self.variant = arguments["variant"]

    def finish(self, *, timeout: float) -> dict[str, Any]:
        if self.variant == "absent":
            raise Failed("not supported: no such thing")
        return {}

    def ask(self, do: str, *, timeout: float, **arguments: Any) -> dict[str, Any]:
        if do == "accuracy":
            return {"top1": 1.0, "perplexity": 20.0}
        if do == "release":
            self.released = True
        if do == "run":
            if self.released:
                raise Failed("the model is gone")
            FakeWorker.order.append(self.variant)
            self.runs += 1
            if (self.variant, self.runs) in (("dies", 2), ("dies later", 4)):
                raise Failed("the process ended by SIGSEGV")
            if self.variant == "interrupted" and self.runs == 2:
                raise KeyboardInterrupt
            seconds = 2.0 if self.variant == "slow" else 1.0
            return {"first": seconds, "steps": [seconds / 10] * 3}
        return {"peak": {"bytes": 5_000_000}, "release": {"bytes": 2_000_000}}.get(do, {})

    def close(self) -> None:
        self.variant = "closed"


@pytest.fixture
def measured():
    """Run variants of these names with the fake worker; the rows by provider and metric, and the reasons of absence."""
    FakeWorker.order = []

    def call(*names: str, expected: type[BaseException] | None = None, **options: Any) -> dict[tuple[str, str], Row]:
        peer = Peer("a peer")
        for name in names:
            peer.variant(name, dtypes=())(lambda spec: None)
        chosen = [Chosen(variant, "float32") for variant in peer.variants.values()]
        rows: list[Row] = []
        if expected is None:
            run_models(PLAN, chosen, {}, add=rows.extend, absent={}, start=FakeWorker, **options)
        else:
            with pytest.raises(expected):
                run_models(PLAN, chosen, {}, add=rows.extend, absent={}, start=FakeWorker, **options)
        return {(row.provider, row.metric): row for row in rows}

    return call


def test_variants_take_turns_and_are_compared_pair_by_pair(measured) -> None:
    rows = measured("base", "slow")
    assert FakeWorker.order == ["base", "slow"] * 3
    assert rows["base", "prefill_tokens_per_s"].p50 == 8.0
    assert rows["slow", "decode_tokens_per_s"].p50 == pytest.approx(5.0)
    ratio = rows["slow", "decode_tokens_per_s"].detail["ratio"]
    assert ratio == {"to": "base", "p20": 0.5, "p50": 0.5, "p80": 0.5}
    assert rows["slow", "ttft_ms"].p50 == 2000.0
    assert rows["slow", "itl_ms"].detail == {"n": 9, "p90": pytest.approx(200.0), "p99": pytest.approx(200.0)}
    assert rows["base", "peak_memory_mb"].p50 == 5.0
    assert rows["base", "model_memory_mb"].p50 == 3.0
    assert rows["base", "perplexity"].p50 == 20.0
    assert rows["slow", "prefill_tokens_per_s"].accuracy["top1"] == 1.0


def test_what_cannot_be_loaded_is_a_row_with_its_error(measured) -> None:
    rows = measured("base", "absent", "slow")
    row = rows["absent", "decode_tokens_per_s"]
    assert (row.p50, row.error) == (None, "not supported: no such thing")
    assert rows["slow", "prefill_tokens_per_s"].p50 == 4.0


def test_who_dies_while_it_is_timed_keeps_its_numbers_and_the_error(measured) -> None:
    rows = measured("base", "dies")
    assert FakeWorker.order == ["base", "dies", "base", "dies", "base"]
    row = rows["dies", "prefill_tokens_per_s"]
    assert (row.p50, row.detail["n"], row.error) == (8.0, 1, "the process ended by SIGSEGV")


def test_an_interruption_keeps_what_was_measured(measured) -> None:
    rows = measured("base", "interrupted", "slow", expected=KeyboardInterrupt)
    assert rows["base", "prefill_tokens_per_s"].detail["n"] == 2
    assert rows["slow", "prefill_tokens_per_s"].detail["n"] == 1


def test_whoever_is_timed_after_the_base_has_died_is_compared_with_nothing(measured) -> None:
    rows = measured("dies later", "slow", "a", at_once=2)
    assert "ratio" not in rows["a", "prefill_tokens_per_s"].detail
    assert rows["slow", "prefill_tokens_per_s"].detail["ratio"]["to"] == "dies later"


def test_nothing_is_compared_with_a_base_that_fails(measured) -> None:
    measured("absent", "slow", expected=ValueError)


def test_groups_that_fit_in_memory_are_each_measured_beside_the_base(measured) -> None:
    rows = measured("base", "a", "slow", at_once=2)
    assert FakeWorker.order == ["base", "a"] * 3 + ["base", "slow"] * 3
    assert rows["slow", "prefill_tokens_per_s"].detail["ratio"]["p50"] == 0.5
    assert (rows["base", "prefill_tokens_per_s"].detail["n"], rows["base", "prefill_tokens_per_s"].error) == (6, None)
    assert rows["base", "model_memory_mb"].p50 == 3.0
    assert at_once(PLAN, 1_000_000) > 100
    assert at_once(PLAN, 10**12) == 2


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A worker of these lines."""

    def write(code: str) -> str:
        (tmp_path / "a_worker.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return "a_worker"

    return write


@pytest.mark.parametrize(
    ("code", "seconds", "message"),
    [
        ("import os, signal; input(); os.kill(os.getpid(), signal.SIGSEGV)", 60, "the process ended by SIGSEGV"),
        ("input(); raise SystemExit('no memory')", 60, "the process ended with status 1: no memory"),
        ('print(\'{"error": "not supported"}\', flush=True); input()', 60, "not supported"),
        ("import time; time.sleep(60)", 1, "no answer within 1 s"),
    ],
)
def test_a_process_that_ends_is_an_error(module, code: str, seconds: int, message: str) -> None:
    worker = WorkerProcess(1, module=module(code))
    try:
        with pytest.raises(Failed, match=f"^{message}$"):
            worker.ask("load", timeout=seconds)
    finally:
        worker.close()


def test_a_process_that_answers(module) -> None:
    code = "import sys\nfor line in sys.stdin: print('{\"ok\": ' + line.strip() + '}', flush=True)"
    worker = WorkerProcess(1, module=module(code))
    try:
        assert worker.ask("run", timeout=20, steps=3) == {"do": "run", "steps": 3}
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"names": "llmkern-int8@bf16,llmkern"}, ["sdpa fp32", "llmkern-int8 bf16", "llmkern fp32"]),
        ({"names": "sdpa@bf16,llmkern@bf16"}, ["sdpa bf16", "llmkern bf16"]),
        ({"names": "llama.cpp-Q8_0"}, ["sdpa fp32", "llama.cpp-Q8_0"]),
        ({"names": "llmkern", "dtype": "bfloat16"}, ["sdpa bf16", "llmkern bf16"]),
    ],
)
def test_choosing_variants_by_name(options: dict[str, Any], expected: list[str]) -> None:
    assert [chosen.name for chosen in choose(variants(), "causal", **options)] == expected


@pytest.mark.parametrize(("tokens", "forwards"), [(0, 1), (1024, 2), (100, 2)])
def test_a_worker_reads_no_window_twice(tmp_path, tokens: int, forwards: int) -> None:
    """The window that is compared with the untouched model's is the first of the perplexity's too."""
    table = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    read: list[int] = []

    def logits(ids: torch.Tensor) -> torch.Tensor:
        read.append(len(ids))
        return table[ids]

    worker = Worker()
    worker.spec = Spec(None, None, "causal", "float32", "cpu", 1, 8, 8, 1)
    worker.runner = SimpleNamespace(logits=logits)
    ids = torch.randint(64, (1024,), generator=torch.Generator().manual_seed(1))
    found = worker.accuracy(ids.tolist(), str(tmp_path / "reference.npy"), True, tokens)
    assert len(read) == forwards
    assert (found["max_abs"], found["top1"]) == (0.0, 1.0)
    if tokens:
        context = min(tokens, 512)
        windows = ids[:tokens].view(-1, context)
        loss = torch.nn.functional.cross_entropy(table[windows[:, :-1]].flatten(0, 1), windows[:, 1:].flatten())
        assert found["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)


def test_a_peer_without_logits_is_timed_and_says_that_it_was_not_judged() -> None:
    def logits(ids: torch.Tensor) -> torch.Tensor:
        raise Unsupported("its server gives out no logits")

    worker = Worker()
    worker.spec = Spec(None, None, "causal", "float32", "cpu", 1, 8, 8, 1)
    worker.runner = SimpleNamespace(logits=logits)
    found = worker.accuracy(list(range(8)), "no file", False, 8)
    assert found == {"unjudged": "not judged: its server gives out no logits"}
    row = Row("model", "demo", "peer", "decode_tokens_per_s", {"batch": 1}, 9.0, 10.0, 11.0, accuracy=found)
    assert "| peer | 10 | not judged: its server gives out no logits |" in markdown([row])


def test_a_worker_trains(tmp_path, monkeypatch) -> None:
    """Each request as `main` answers it; gradients stand beside the untouched model's, and steps change the weights."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}

    def tiny(spec: Spec, **_: Any) -> Any:
        torch.manual_seed(0)
        return Loaded("tiny", LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)), None)

    monkeypatch.setattr(variants_module, "loaded_model", tiny)
    ids, path = list(range(16)), str(tmp_path / "reference.npy")
    spec = Spec("tiny", None, "training", "float32", "cpu", 2, 8, 0, torch.get_num_threads())
    for name in ("sdpa", "llmkern"):
        worker = Worker()
        with worker.mode():
            worker.load(name, dataclasses.asdict(spec))
        with worker.mode():
            found = worker.accuracy(ids, path, name == "sdpa", 0)
            before = worker.runner.model.lm_head.weight.detach().clone()
            assert worker.run(ids)["first"] > 0
        assert found["rel"] < 1e-5
        assert not torch.equal(worker.runner.model.lm_head.weight, before)
    with worker.mode():
        worker.runner.model.lm_head.weight.data.mul_(1.1)
        assert worker.accuracy(ids, path, False, 0)["rel"] > 1e-3


def test_the_usual_variants() -> None:
    names = [chosen.name for chosen in choose(variants(), "causal")]
    assert names[0] == "sdpa fp32"
    assert {"sdpa bf16", "eager fp32", "quantize_dynamic fp32", "llmkern bf16", "llmkern-int8 fp32"} <= set(names)
    assert {"llama.cpp-F32", "llama.cpp-BF16", "llama.cpp-Q8_0", "torchao-int8 fp32"} <= set(names)
    assert "compile bf16" not in names
    assert "compile bf16" in [chosen.name for chosen in choose(variants(), "causal", compiled=True)]
    int8 = [chosen.name for chosen in choose(variants(), "causal", int8=True)]
    assert int8[0] == "sdpa fp32"
    assert all("int8" in name or "Q8" in name or "quantize" in name for name in int8 if not name.startswith("sdpa"))
    assert "onnxruntime-int8" in [chosen.name for chosen in choose(variants(), "encoder")]
    assert [chosen.name for chosen in choose(variants(), "training", dtype="bfloat16", compiled=True)] == [
        "sdpa bf16",
        "compile bf16",
        "llmkern bf16",
        "liger bf16",
    ]
    quick = [chosen.name for chosen in choose(variants(), "causal", quick=True)]
    assert [name for name in quick if name.startswith("llmkern")] == [
        "llmkern fp32",
        "llmkern bf16",
        "llmkern-int8 fp32",
    ]
    peers = ["sdpa fp32", "sdpa bf16", "quantize_dynamic fp32", "llama.cpp-Q8_0", "openvino-int8", "torchao-int8 fp32"]
    assert sorted(name for name in quick if not name.startswith("llmkern")) == sorted(peers)


def test_kinds() -> None:
    assert kind_of(published_config("gpt2")) == "causal"
    assert kind_of(published_config("bert-large")) == "encoder"
    with pytest.raises(ValueError, match="t5 models are encoder-decoders"):
        kind_of(T5Config())


@pytest.mark.parametrize("name", config_names())
def test_published_shapes_are_those_of_their_names(name: str) -> None:
    from transformers import AutoModel

    with torch.device("meta"):
        count = AutoModel.from_config(published_config(name)).num_parameters()
    # Without the output head, which AutoModel leaves out: 0.5 of Llama-3's 8.0 billion, and of Qwen2.5's 7.6.
    billions = {
        "llama-3-8b": 7.5,
        "qwen2.5-7b": 7.07,
        "mistral-7b": 7.11,
        "gpt2-xl": 1.56,
        "gpt2": 0.124,
        "smollm2-135m": 0.1345,
        "bert-large": 0.335,
        "bert-base": 0.1095,
    }
    assert count / 1e9 == pytest.approx(billions[name], rel=0.01)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2),
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    ],
    ids=["llama", "gpt2"],
)
def test_random_weights_are_whole(config: Any, monkeypatch) -> None:
    """Laid out on meta, then filled: every buffer as a model that was built directly has it."""
    monkeypatch.setattr(variants_module, "published_config", lambda name: config)
    model: Any = loaded_model(Spec(None, "any", "causal", "float32", "cpu", 1, 8, 4, 1)).model
    direct = dict(type(model)(config).named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, direct[name]) if name in direct else pytest.fail(name)
    assert model.lm_head.weight.shape == (64, 32)
    assert model.config.num_hidden_layers == 2
    logits = model(input_ids=torch.arange(8)[None]).logits
    assert bool(logits.isfinite().all())
    assert float(logits.std()) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give MODEL or --config NAME, one of the two"),
        (["demo:smollm2", "--config", "gpt2"], "give MODEL or --config NAME, one of the two"),
        (["--config", "gpt5"], "unknown shape 'gpt5'; there are bert-base, "),
        (["--config", "gpt2", "--batch", "0"], "--batch is 0, expected at least 1"),
        (["--config", "gpt2", "--prompt-len", "1000"], "make 1128 tokens, expected at most 1024"),
        (["--config", "gpt2", "--variants", "vllm"], "unknown variant 'vllm'; there are sdpa, "),
        (["--config", "gpt2", "--variants", "sdpa@fp8"], "has dtype 'fp8', expected fp32, bf16 or fp16"),
        (["--config", "gpt2", "--quantize", "int4"], "--quantize is 'int4', expected int8"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], message: str, capsys) -> None:
    assert run(["bench", "model", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1


def test_a_model_from_the_command_line(tmp_path: Path) -> None:
    """A tiny checkpoint by real processes: untouched, by llmkern, and by a peer that cannot."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    path = tmp_path / "model.json"
    sizes = ["--prompt-len", "16", "--new-tokens", "4", "--tokens", "64", "--rounds", "2"]
    chosen = "sdpa,llmkern,llmkern-int8,llmkern:cuda,quantize_dynamic@bf16"
    assert run(["bench", "model", str(tmp_path / "model"), "--variants", chosen, *sizes, "--json", str(path)]) == 0
    rows = {(row.provider, row.metric): row for row in Result.load(path).rows}
    for name in ("sdpa fp32", "llmkern fp32", "llmkern-int8 fp32"):
        assert rows[name, "decode_tokens_per_s"].p50 > 0, name
        assert rows[name, "decode_tokens_per_s"].detail["n"] == 2
        assert rows[name, "peak_memory_mb"].p50 > rows[name, "model_memory_mb"].p50 >= 0
    assert rows["sdpa fp32", "ttft_ms"].accuracy["max_abs"] == 0.0
    assert rows["llmkern fp32", "ttft_ms"].accuracy["max_abs"] < 1e-4
    assert rows["llmkern fp32", "perplexity"].p50 == pytest.approx(rows["sdpa fp32", "perplexity"].p50, rel=1e-3)
    assert rows["llmkern fp32", "itl_ms"].detail["n"] == 6
    assert "float32 only" in rows["quantize_dynamic bf16", "decode_tokens_per_s"].error
    assert rows["llmkern:cuda fp32", "decode_tokens_per_s"].p50 is None
    assert json.loads(path.read_text())["environment"]["threads"] == torch.get_num_threads()
