"""`llmkern check`: swap, compare with the original, undo."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from torch import Tensor, nn

from llmkern.cli.arguments import SCHEMES, check_scheme
from llmkern.cli.models import DEVICE_HELP, DTYPE_HELP, HELP, Loaded, load, quantize, token_ids
from llmkern.cli.output import print_json, save, say, task, working
from llmkern.cli.speed import Speed, speeds
from llmkern.quantization import QuantReport
from llmkern.quantization.report import tensor_bytes
from llmkern.report import report
from llmkern.swap import SwapReport, optimize_, restore_
from llmkern.swap.report import current as swap_report
from llmkern.table import render
from llmkern.testing.perplexity import Divergence, divergence, perplexity
from llmkern.verify import Accuracy, outputs_of, verify

__all__ = ["Check", "check", "run_check"]

# Perplexity may be this many times the original's.
BOUNDS = {
    "optimized": 1.001,
    "int8": 1.02,
    "int8-block": 1.005,
    "int4": 1.06,
    "int4-g32": 1.06,
    "int5": 1.03,
    "int6": 1.01,
    "gguf": 1.005,
}
GGUF = "gguf"
"""The scheme of a .gguf file whose blocks are kept; the original is what they stand for, in floating point."""
# Tokens of the two rows that are compared in float64; perplexity reads as many tokens as asked for.
VERIFIED_LENGTH = 256
CONTEXT = 512


@dataclass(frozen=True)
class Check:
    """Result of `llmkern check`.

    perplexity: of "original", "optimized", and what was asked for: the scheme's name, and "int8 cache" for the
        optimized model with one; None for models without one.
    quantized: the report of quantizing, where that was asked for.
    divergence: of the quantized model from the original, where the model has a perplexity.
    speed: of the optimized and the quantized model, likewise.
    """

    model: str
    report: SwapReport
    accuracy: Accuracy
    perplexity: dict[str, float | None]
    divergence: Divergence | None
    quantized: QuantReport | None
    speed: dict[str, Speed] | None
    restored_bit_equal: bool

    @property
    def failures(self) -> list[str]:
        """Violations of the accuracy rule, one sentence each."""
        found = [] if self.accuracy.verdict else [self.accuracy.sentence]
        original = self.perplexity["original"]
        for kind, bound in BOUNDS.items():
            value = self.perplexity.get(kind)
            if original is not None and value is not None and not value <= bound * original:
                found.append(f"perplexity {kind} is {value:.4f}, at most {bound} · {original:.4f} is accepted")
        if not self.restored_bit_equal:
            found.append("the restored model's outputs are not bit-equal to the original's")
        return found

    def to_dict(self) -> dict[str, Any]:
        rows = [asdict(row) for row in self.report.rows]
        numbers = self.accuracy.to_dict()
        return {
            "model": self.model,
            "swapped": [row for row in rows if row["action"] == "swapped"],
            "left": [row for row in rows if row["action"] == "left"],
            "accuracy": {name: numbers[name] for name in ("max_abs", "rel", "kl", "top1")},
            "perplexity": self.perplexity,
            "divergence": None if self.divergence is None else asdict(self.divergence),
            "bytes": None if self.quantized is None else [self.quantized.bytes_before, self.quantized.bytes_after],
            "speed": None if self.speed is None else {name: asdict(each) for name, each in self.speed.items()},
            "restored_bit_equal": self.restored_bit_equal,
            "verdict": not self.failures,
        }

    def __str__(self) -> str:
        parts = [str(self.report), str(self.accuracy)]
        if self.quantized is not None:
            parts.append(str(self.quantized))
        rows = [(name, f"{value:.4f}") for name, value in self.perplexity.items() if value is not None]
        if rows:
            parts.append(render("perplexity", ("model", "perplexity"), rows))
        if (d := self.divergence) is not None:
            headers = ("mean KL, nats", "99.9th percentile", "same top token")
            row = (f"{d.mean:.3g}", f"{d.p999:.3g}", f"{d.same_top:.2%}")
            parts.append(render("the quantized model against the original", headers, [row]))
        if self.speed is not None and self.quantized is not None:
            size = dict(zip(self.speed, (self.quantized.bytes_before, self.quantized.bytes_after), strict=True))
            heads = ("optimized model", "MiB", "prefill, tokens/s", "decode, tokens/s")
            lines = [
                (n, f"{size[n] / 2**20:.1f}", f"{s.prefill:,.0f}", f"{s.decode:.1f}") for n, s in self.speed.items()
            ]
            parts.append(render("memory and speed", heads, lines))
        parts.append(f"restored bit-equal: {'yes' if self.restored_bit_equal else 'no'}")
        parts.append("\n".join(f"FAIL  {failure}" for failure in self.failures) or "OK    within the rule")
        return "\n".join(parts)


def check(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=HELP)],
    scheme: Annotated[
        Optional[str],  # noqa: UP045  (typer reads annotations at run time, on 3.10 too)
        typer.Option("--quantize", metavar="SCHEME", help=f"Measure the quantized model too: {SCHEMES}."),
    ] = None,
    kv_cache: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--kv-cache", metavar="DTYPE", help="int8: measure the perplexity with an int8 KV cache too."),
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of real prose for the perplexity.")] = 4096,
    dtype: Annotated[str, typer.Option(metavar="NAME", help=DTYPE_HELP)] = "auto",
    device: Annotated[str, typer.Option(metavar="NAME", help=DEVICE_HELP)] = "auto",
    save_to: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--save", metavar="FILE", help="Write the result, with this environment, as JSON."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Swap kernels into a model, compare it with the original on real text, undo.  Exit status 1 outside the rule.

    The rule: the largest error against a float64 run is at most twice the original's own, plus one rounding;
    perplexity grows by at most 0.1%, with int8-block by 0.5%, with int6 by 1%, with int8 by 2%, with int5
    by 3%, with int4 by 6%; the restored model is bit-equal.

    \b
    llmkern check demo:smollm2
    llmkern check ./my-checkpoint --dtype bfloat16 --json
    llmkern check demo:smollm2 --quantize int8 --kv-cache int8 --tokens 20480
    llmkern check model.gguf
    """
    check_scheme(scheme)
    if kv_cache not in (None, "int8"):
        raise ValueError(f"--kv-cache is {kv_cache}, expected int8")
    if tokens < 2:
        raise ValueError(f"--tokens is {tokens}, expected at least 2")
    loaded = load(model, dtype=dtype, device=device)
    if scheme is None and model.endswith(".gguf"):
        scheme = GGUF
    found = run_check(loaded, tokens=tokens, scheme=scheme, int8_cache=kv_cache is not None)
    if save_to is not None:
        options = (f" --quantize {scheme}" if scheme else "") + (f" --kv-cache {kv_cache}" if kv_cache else "")
        save(save_to, f"llmkern check {model}{options} --tokens {tokens} --dtype {dtype}", found.to_dict())
    if as_json:
        print_json(found.to_dict())
    else:
        print(found)
    if found.failures:
        raise typer.Exit(1)


def run_check(loaded: Loaded, *, tokens: int, scheme: str | None = None, int8_cache: bool = False) -> Check:
    """Everything that `llmkern check` measures; the loaded model itself stays as it is."""
    original = loaded.model
    if loaded.model.main_input_name != "input_ids":
        raise ValueError(f"MODEL {loaded.name} takes {loaded.model.main_input_name}; check compares models of text")
    ids = token_ids(loaded, tokens).to(_device_of(original))
    inputs = _inputs(loaded, ids)
    model = copy.deepcopy(original)
    swapped = swap_report(optimize_(model, on_unsupported="ignore"))
    assert swapped is not None
    with working("comparing with the original, and both with float64"):
        accuracy = verify(model, original, **inputs)
    values: dict[str, float | None] = {"original": None, "optimized": None}
    if scheme is not None:
        values[scheme] = None
    if loaded.is_language_model:
        values["original"] = _perplexity(original, ids, "perplexity of the original")
        values["optimized"] = _perplexity(model, ids, "perplexity of the optimized model")
        if int8_cache:
            from llmkern.integrations.transformers.cache import KVCache

            what = "perplexity of the optimized model with an int8 cache"
            values["int8 cache"] = _perplexity(model, ids, what, lambda: KVCache(original.config, dtype="int8"))
    restore_(model)
    restored = _bit_equal(model, original, inputs)
    quantized, apart, speed = None, None, None
    if scheme is not None:
        copied, quantized = _quantized(loaded, scheme)
        optimize_(copied, on_unsupported="ignore")
        if loaded.is_language_model:
            with task(f"perplexity in {scheme}, and the divergence from the original") as progress:
                apart = divergence(copied, original, ids, context=_context(copied), progress=progress)
            values[scheme] = apart.perplexity
            with working("timing both"):
                speed = speeds({"original": optimize_(model, on_unsupported="ignore"), scheme: copied}, ids)
        else:
            say(f"{scheme} is judged by perplexity, which this kind of model does not have")
    return Check(loaded.name, swapped, accuracy, values, apart, quantized, speed, restored)


def _quantized(loaded: Loaded, scheme: str) -> tuple[nn.Module, QuantReport]:
    """The quantized model, and the report of it."""
    if scheme != GGUF:
        model = copy.deepcopy(loaded.model)
        return model, quantize(model, loaded, scheme)
    device = _device_of(loaded.model)
    packed = load(loaded.name, dtype="auto", device=str(device), packed=True).model
    found = report(packed).quantization
    assert found is not None
    return packed, replace(found, bytes_before=tensor_bytes(loaded.model))


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _inputs(loaded: Loaded, ids: Tensor) -> dict[str, Tensor]:
    """Two rows of text, one of them half padding: on the left for what continues text, else on the right."""
    config: Any = loaded.model.config
    # Positions of RoBERTa and its kin begin behind the padding index.
    room = (getattr(config, "max_position_embeddings", None) or math.inf) - 2
    length = int(max(min(VERIFIED_LENGTH, len(ids), room), 1))
    half = length // 2
    rows = torch.stack([ids[:length], ids[:length]])
    mask = torch.ones_like(rows)
    padding = slice(0, half) if loaded.is_language_model else slice(length - half, length)
    mask[1, padding] = 0
    rows[1, padding] = getattr(config, "pad_token_id", None) or 0
    inputs = {"input_ids": rows, "attention_mask": mask}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = rows[:, : max(half, 1)]
    return inputs


def _context(model: nn.Module) -> int:
    limit: Any = getattr(model.config, "max_position_embeddings", None)
    return min(CONTEXT, limit or CONTEXT)


def _perplexity(model: nn.Module, ids: Tensor, what: str, cache: Callable[[], Any] | None = None) -> float:
    with task(what) as progress:
        return perplexity(model, ids, context=_context(model), cache=cache, progress=progress)


def _bit_equal(model: nn.Module, original: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Outputs and parameters of both are the same bits."""
    with torch.no_grad():
        outputs, expected = outputs_of(model, inputs), outputs_of(original, inputs)
    states = model.state_dict(), original.state_dict()
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in ((outputs, expected), states)
    )
