"""vLLM's engine with and without llmkern's plugin, on SmolLM2: prefill, decoding of 1 and 8 requests, equal tokens.

Each variant runs in a process of its own; rounds take turns, A B C … A B C ….  "Agreement" compares greedy tokens with
those of vLLM's own float32, place by place, also after the first that differs.

    make vllm    # in an environment of its own, where vLLM and the plugin are installed
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from llmkern.bench.environment import device_name, environment, slug
from llmkern.bench.readme import paths
from llmkern.bench.schema import Result, Row
from llmkern.bench.servers import Server, Setting, running
from llmkern.bench.tables import text
from llmkern.integrations.vllm import VERSION, engine_options

PROMPT, ANSWER, REQUESTS = 448, 64, (1, 8)
DECODED_PROMPT = 32  # tokens; short, as the time of the first token is subtracted
QUANTIZED = "int8 checkpoint"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "vLLM float32": ("float32", {}),
    "vLLM bfloat16": ("bfloat16", {}),
    "llmkern float32": ("float32", engine_options()),
    "llmkern bfloat16": ("bfloat16", engine_options()),
    "llmkern int8, float32": ("float32", engine_options("int8")),
    "llmkern int8, bfloat16": ("bfloat16", engine_options("int8")),
    "llmkern int8-block, float32": ("float32", engine_options("int8-block")),
    "llmkern int4, float32": ("float32", engine_options("int4")),
    f"llmkern {QUANTIZED}, float32": ("float32", engine_options("checkpoint")),
}
"""dtype and options of each; the first is what the others are compared with."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "DO_NOT_TRACK": "1",
}


def measured(variant: str, folder: str) -> dict[str, Any]:
    """Run one variant in this process; tokens/s by requests and phase, and the tokens of the answers."""
    from vllm import LLM, SamplingParams, TokensPrompt

    from llmkern.testing.real_models import prose

    dtype, options = VARIANTS[variant]
    sizes: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": max(REQUESTS), "enable_prefix_caching": False}
    engine = LLM(folder, dtype=dtype, enforce_eager=True, disable_log_stats=True, **sizes, **options)
    ids = engine.get_tokenizer()(prose())["input_ids"]
    starts = range(0, max(REQUESTS) * PROMPT, PROMPT)

    def seconds(count: int, prompt: int, tokens: int) -> tuple[float, list[list[int]]]:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        prompts = [TokensPrompt(prompt_token_ids=ids[start : start + prompt]) for start in starts[:count]]
        begin = time.perf_counter()
        answers = engine.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - begin, [list(answer.outputs[0].token_ids) for answer in answers]

    seconds(max(REQUESTS), DECODED_PROMPT, 4)  # warm-up
    found: dict[str, Any] = {}
    for count in REQUESTS:
        prefill, _ = seconds(count, PROMPT, 1)
        first, _ = seconds(count, DECODED_PROMPT, 1)
        whole, tokens = seconds(count, DECODED_PROMPT, ANSWER + 1)
        found[str(count)] = {
            "prefill": count * PROMPT / prefill,
            "decode": count * ANSWER / (whole - first),
            "tokens": tokens,
        }
    return found


def run(variant: str, folder: Path) -> dict[str, Any]:
    """Run one variant in a process of its own.  Raises RuntimeError, with its last line, where it fails."""
    command = [sys.executable, __file__, str(folder), "--one", variant]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise RuntimeError(f"{variant} failed: {lines[-1][:300]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def rows(found: dict[str, list[dict[str, Any]]]) -> list[Row]:
    """Return the table's rows of each variant's rounds."""
    base = found[next(iter(VARIANTS))]
    made = []
    for count in map(str, REQUESTS):
        for variant, rounds in found.items():
            pairs = zip(_tokens(rounds[0][count]), _tokens(base[0][count]), strict=True)
            accuracy = {"top1": statistics.fmean(mine == theirs for mine, theirs in pairs)}
            for phase in ("prefill", "decode"):
                values = [each[count][phase] for each in rounds]
                ratio = statistics.median(
                    mine / theirs[count][phase] for mine, theirs in zip(values, base, strict=True)
                )
                detail = {
                    "n": len(values),
                    **({} if rounds is base else {"ratio": {"to": "vLLM float32", "p50": ratio}}),
                }
                cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
                name = f"demo:smollm2 in vLLM {VERSION}, {count} at a time"
                x = {"prompt_len": PROMPT, "new_tokens": ANSWER}
                row = Row("model", name, variant, f"{phase}_tokens_per_s", x, accuracy=accuracy, detail=detail)
                row.p20, row.p50, row.p80 = cuts[0], statistics.median(values), cuts[3]
                made.append(row)
    return made


def _tokens(found: dict[str, Any]) -> list[int]:
    return [token for answer in found["tokens"] for token in answer]


def ask_server(folder: Path) -> str:
    """Ask vLLM's server, with the plugin and int8, for the capital of France; returns its answer."""
    from openai import OpenAI

    options = engine_options("int8")
    flags = [
        f"--{name.replace('_', '-')}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in options.items()
    ]

    def command(setting: Setting, port: int) -> list[str]:
        start = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", setting.folder]
        sizes = ["--max-model-len", str(setting.context), "--max-num-seqs", str(setting.clients)]
        return [
            *start,
            "--port",
            str(port),
            "--host",
            "127.0.0.1",
            "--dtype",
            setting.dtype,
            "--enforce-eager",
            *sizes,
            *flags,
        ]

    setting = Setting("smollm2", str(folder), "float32", clients=4, context=512, threads=1)
    with running(Server("vLLM's server", None, command, lambda setting: setting.folder), setting) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        question: Any = [{"role": "user", "content": "What is the capital of France?"}]
        said = client.chat.completions.create(model=server.model, messages=question, max_tokens=24, temperature=0)
        return said.choices[0].message.content or ""


def prepare(folder: Path) -> None:
    """Save SmolLM2, and SmolLM2 quantized to int8, for vLLM to load."""
    from llmkern import quantize_
    from llmkern.testing.real_models import load_smollm2

    model, tokenizer = load_smollm2()
    model.save_pretrained(folder / "float32")
    quantize_(model, "int8")
    model.save_pretrained(folder / "int8")
    for name in ("float32", "int8"):
        tokenizer.save_pretrained(folder / name)


def main() -> None:
    """Measure the variants, print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the checkpoints are")
    parser.add_argument("--prepare", action="store_true", help="write them, with llmkern's own transformers")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--record", type=Path, help="benchmarks/, where the result is kept")
    parser.add_argument("--no-server", action="store_true", help="leave out the question to vLLM's server")
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.prepare:
        prepare(asked.folder)
        return
    if asked.one is not None:
        print(json.dumps(measured(asked.one, str(asked.folder))))
        return
    os.environ.update(ENVIRONMENT)
    floating, quantized = asked.folder / "float32", asked.folder / "int8"
    if not asked.no_server:
        print(f"vLLM's server with llmkern's int8 says: {ask_server(floating)}")
    chosen = list(dict.fromkeys([next(iter(VARIANTS)), *asked.variants]))
    found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in chosen}
    for variant in chosen * asked.rounds:
        print(f"{variant} …", file=sys.stderr)
        found[variant].append(run(variant, quantized if QUANTIZED in variant else floating))
    device = torch.device("cpu")
    more = {"absent_peers": {}, "left_out": []}
    result = Result("make vllm", environment(device) | more, rows(found))
    print(text(result.rows))
    if asked.record is not None:
        result.save(paths(asked.record, slug(device_name(device)), "vllm")[0])


if __name__ == "__main__":
    main()
