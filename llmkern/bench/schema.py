"""The one schema of benchmark results, for ops, models and servers.

    {"schema": 1, "command": "…", "environment": {…}, "rows": [{…}, …]}

A row is one number with its spread:

suite           "ops", "model", "serve" or "families"
name            the op or the model
provider        who computed: "llmkern", "torch" (on a TPU "xla"), a peer; of models the variant and its dtype; of
                serving the server
metric, unit    ops: time_us (a call, as Python makes it), kernel_us (replayed in a CUDA graph)
                models: prefill_tokens_per_s, decode_tokens_per_s, ttft_ms, itl_ms (of all steps; p90 and p99 are in
                `detail`), peak_memory_mb, model_memory_mb (what of the peak goes with the model: its weights, cache and
                intermediate results), sentences_per_s, perplexity
                serving: throughput_tokens_per_s (generated, of all clients), ttft_ms and itl_ms as clients see them,
                peak_memory_mb (of the server's process)
                training (suite "model"): train_tokens_per_s (forward, backward and optimizer), peak_memory_mb
                families: phases_per_s (prompts, inputs or generated tokens, by x["phase"])
x               what the number belongs to: sizes, dtype, mode, batch, lengths …; "sweep" names the line of a plot
p20, p50, p80   percentiles over the repetitions, in `unit`; null where nothing was measured
speed_of_light  the share of the device's measured ceiling, by bytes or operations, whichever is nearer; ops only
accuracy        what was checked, and the numbers: {"error", "baseline"} by the accuracy rule (the largest
                absolute error and PyTorch's own), or {"relative_error", "approximate"}; of models {"top1", "max_abs",
                "rel", "perplexity", "cosine"}, or {"unjudged": reason} where a peer gives out no logits
detail          of families: ratio, untouched (its percentiles), layers ("whole", or why they are not)
                bytes, operations, gb_per_s, tflop_per_s of ops; n, p90, p99; ratio: {"to", "p20", "p50", "p80"}, how
                many times as good as that provider, pair by pair
error           null, or the sentence why there is no number
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmkern.cli.output import finite

__all__ = ["METRICS", "SCHEMA", "Result", "Row", "lower_is_better"]

SCHEMA = 1
METRICS = {
    "time_us": "µs",
    "kernel_us": "µs",
    "prefill_tokens_per_s": "tokens/s",
    "throughput_tokens_per_s": "tokens/s",
    "decode_tokens_per_s": "tokens/s",
    "ttft_ms": "ms",
    "itl_ms": "ms",
    "peak_memory_mb": "MB",
    "model_memory_mb": "MB",
    "sentences_per_s": "sentences/s",
    "train_tokens_per_s": "tokens/s",
    "phases_per_s": "1/s",
    "perplexity": "",
}
"""Every metric and its unit."""


def lower_is_better(metric: str) -> bool:
    """True if the smaller number wins."""
    return not metric.endswith("_per_s")


@dataclass
class Row:
    """One number; the module's docstring describes the fields."""

    suite: Literal["ops", "model", "serve", "families"]
    name: str
    provider: str
    metric: str
    x: dict[str, Any]
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    speed_of_light: float | None = None
    accuracy: dict[str, Any] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def unit(self) -> str:
        return METRICS[self.metric]

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """Identity of the row across runs."""
        return self.suite, self.name, self.provider, self.metric, json.dumps(self.x, sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        order = ("suite", "name", "provider", "metric")
        return {name: values.pop(name) for name in order} | {"unit": self.unit} | values


@dataclass
class Result:
    """A run: its command, its environment, its rows."""

    command: str
    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        rows = [row.to_dict() for row in self.rows]
        content = {"schema": SCHEMA, "command": self.command, "environment": self.environment, "rows": rows}
        return finite(content)

    def save(self, path: Path) -> None:
        """Write the JSON; the file is whole or absent at every moment."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as scratch:
            scratch.write(text)
        os.chmod(scratch.name, 0o644)
        os.replace(scratch.name, path)

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read what `save` wrote; ValueError with one line for anything else."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            schema = content["schema"]
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is no result of llmkern bench") from None
        if schema != SCHEMA:
            raise ValueError(f"{path} has schema {schema}, expected {SCHEMA}: measure again, or use the older llmkern")
        rows = [Row(**{name: value for name, value in row.items() if name != "unit"}) for row in content["rows"]]
        return cls(content["command"], content["environment"], rows)
