"""The model suite: every variant in a process of its own, checked against the untouched model, then timed in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkern.bench import stats
from llmkern.bench.environment import memory_of
from llmkern.bench.peer import Peer, Variant
from llmkern.bench.schema import Row
from llmkern.bench.variants import Spec
from llmkern.bench.workers import Failed, WorkerProcess

__all__ = ["Chosen", "Plan", "at_once", "choose", "run_models"]

LOAD_SECONDS, RUN_SECONDS = 900.0, 300.0
MEMORY_SHARE = 0.7
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_LONG = {short: long for long, short in _SHORT.items()} | {long: long for long in _SHORT}


@dataclass(frozen=True)
class Chosen:
    """A variant in one dtype; `name` as rows show it."""

    variant: Variant
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.variant.name} {_SHORT[self.dtype]}" if self.variant.dtypes else self.variant.name


@dataclass(frozen=True)
class Plan:
    """A measurement: the model, real text as token ids, tokens of perplexity (0: none), repetitions."""

    name: str
    spec: Spec
    ids: list[int]
    tokens: int
    rounds: int
    x: dict[str, Any]


def choose(
    known: dict[str, Variant],
    kind: str,
    *,
    names: str | None = None,
    dtype: str | None = None,
    int8: bool = False,
    compiled: bool = False,
    quick: bool = False,
) -> list[Chosen]:
    """The variants to run; the first is the untouched model, which all others are compared with.

    names: "sdpa,llmkern-int8@bf16,…".  dtype: in place of each variant's own.  int8: the untouched model and the int8
    variants.  compiled: torch.compile too, which compiles for minutes.  quick: fewer, and int8 beside one dtype only.
    """
    if names is not None:
        found = [_named(known, kind, name, dtype) for name in names.split(",")]
    else:
        found = []
        for variant in known.values():
            wanted = variant.default and (variant.quick or not quick) or (compiled and variant.name == "compile")
            if kind not in variant.kinds or not wanted or (int8 and not (variant.int8 or variant.name == "sdpa")):
                continue
            one = dtype is not None or not variant.dtypes or (quick and variant.int8)
            own = variant.dtypes[:1] if one else variant.dtypes
            found += [Chosen(variant, dtype or name) for name in own or ("float32",)]
    base = Chosen(known["sdpa"], dtype or "float32")
    if names is not None and found and found[0].variant.name in ("sdpa", "eager"):
        base = found[0]
    return [base, *[chosen for chosen in found if chosen != base]]


def _named(known: dict[str, Variant], kind: str, text: str, dtype: str | None) -> Chosen:
    name, _, short = text.partition("@")
    able = [variant.name for variant in known.values() if kind in variant.kinds]
    if name not in able:
        raise ValueError(f"--variants: unknown variant {name!r}; there are {', '.join(able)}")
    if short and short not in _LONG:
        raise ValueError(f"--variants: {text!r} has dtype {short!r}, expected fp32, bf16 or fp16")
    variant = known[name]
    return Chosen(variant, _LONG[short] if short else dtype or (variant.dtypes or ("float32",))[0])


def at_once(plan: Plan, parameters: int) -> int:
    """Return how many variants fit in the device's memory at once, counting each in fp32 and its cache as much more."""
    fit = MEMORY_SHARE * memory_of(plan.spec.device) / (2 * 4 * max(parameters, 1))
    return max(2, int(fit))


def run_models(
    plan: Plan,
    chosen: Sequence[Chosen],
    peers: dict[str, Peer],
    *,
    add: Callable[[list[Row]], None],
    absent: dict[str, str],
    at_once: int = 100,
    progress: Callable[[int, int], None] = lambda done, total: None,
    start: Callable[[int], WorkerProcess] = WorkerProcess,
) -> None:
    """Load and check, then `plan.rounds` repetitions in turn; `add` gets the rows, also where this is interrupted.

    A variant that fails is a row with its error.  `absent` gets the reasons of peers that are not there.
    at_once: how many are in memory together; the first, which all are compared with, is among them every time.
    """
    for one in chosen:
        peer = peers.get(one.variant.peer)
        if peer is not None and (reason := peer.missing()) is not None:
            absent[peer.name] = reason
    base, *others = [_Run(one) for one in chosen if one.variant.peer not in absent]
    size = max(at_once - 1, 1)
    groups = [others[i : i + size] for i in range(0, len(others), size)] or [[]]
    total = 1 + len(others) + plan.rounds * (len(groups) + len(others))
    steps = iter(range(1, total + 1))
    with tempfile.TemporaryDirectory() as folder, _closing([base, *others]):
        reference = str(Path(folder) / "reference.npy")
        try:
            for group in groups:
                runs = [base, *group]
                for run, following in zip(runs, [*group, None], strict=True):
                    run.offset = len(base.first)
                    if run is base and base.first:
                        continue
                    run.start(start, plan.spec)
                    if following is not None:  # imports and loads while the one before it is checked
                        following.start(start, plan.spec)
                    run.load(plan, reference, write=run is base)
                    progress(next(steps), total)
                    if base.error:
                        raise ValueError(f"{base.chosen.name} failed, and all are compared with it: {base.error}")
                for _ in range(plan.rounds):
                    for run in runs:
                        run.repeat(plan)
                        progress(next(steps), total)
                for run in group:
                    run.finish()
                    run.close()
            base.finish()
        finally:
            add([row for run in (base, *others) for row in run.rows(plan, base)])


class _Run:
    """One variant: its process, and what has been measured.  offset: the base's repetitions before its first."""

    def __init__(self, chosen: Chosen) -> None:
        self.chosen = chosen
        self.worker: WorkerProcess | None = None
        self.error: str | None = None
        self.accuracy: dict[str, Any] = {}
        self.first: list[float] = []
        self.steps: list[list[float]] = []
        self.peak: int | None = None
        self.left: int | None = None  # of memory, when the model is gone
        self.offset = 0

    def start(self, start: Callable[[int], WorkerProcess], spec: Spec) -> None:
        if self.worker is None and self.error is None:
            self.worker = start(spec.threads)
            own = dataclasses.asdict(dataclasses.replace(spec, dtype_name=self.chosen.dtype))
            self._attempt(lambda worker: worker.begin("load", variant=self.chosen.variant.name, spec=own))

    def load(self, plan: Plan, reference: str, *, write: bool) -> None:
        def everything(worker: WorkerProcess) -> None:
            worker.finish(timeout=LOAD_SECONDS)
            self.accuracy = worker.ask(
                "accuracy", timeout=LOAD_SECONDS, ids=plan.ids, reference=reference, write=write, tokens=plan.tokens
            )
            worker.ask("warm", timeout=LOAD_SECONDS, ids=plan.ids)
            worker.ask("reset", timeout=RUN_SECONDS)

        self._attempt(everything)

    def repeat(self, plan: Plan) -> None:
        def once(worker: WorkerProcess) -> None:
            answer = worker.ask("run", timeout=RUN_SECONDS, ids=plan.ids)
            self.first.append(answer["first"])
            self.steps.append(answer["steps"])

        self._attempt(once)

    def finish(self) -> None:
        def ask(worker: WorkerProcess) -> None:
            self.peak = worker.ask("peak", timeout=RUN_SECONDS)["bytes"]
            self.left = worker.ask("release", timeout=RUN_SECONDS)["bytes"]

        self._attempt(ask)

    def _attempt(self, action: Callable[[WorkerProcess], None]) -> None:
        """Ask the process, or return None without one; a failure is kept, and ends the process."""
        if self.worker is not None:
            try:
                action(self.worker)
            except Failed as failure:
                self.error = str(failure)
                self.close()

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def rates(self, plan: Plan) -> dict[str, list[float]]:
        """Per repetition, by metric."""
        spec = plan.spec
        if spec.kind == "encoder":
            return {"sentences_per_s": [spec.batch / seconds for seconds in self.first]}
        if spec.kind == "training":
            return {"train_tokens_per_s": [spec.batch * spec.prompt_len / seconds for seconds in self.first]}
        found = {"prefill_tokens_per_s": [spec.batch * spec.prompt_len / seconds for seconds in self.first]}
        if spec.new_tokens > 1:
            found["decode_tokens_per_s"] = [spec.batch * len(steps) / sum(steps) for steps in self.steps]
        return found

    def rows(self, plan: Plan, base: _Run) -> list[Row]:
        def row(metric: str, **values: Any) -> Row:
            return Row("model", plan.name, self.chosen.name, metric, plan.x, accuracy=self.accuracy, **values)

        if not self.first:
            rates = {"encoder": "sentences_per_s", "training": "train_tokens_per_s"}
            metric = rates.get(plan.spec.kind, "decode_tokens_per_s")
            return [row(metric, error=self.error or "interrupted before it was measured")]
        found, theirs = [], base.rates(plan)
        for metric, samples in self.rates(plan).items():
            rate = stats.summary(samples)
            detail: dict[str, Any] = {"n": rate.n}
            if self is not base and (beside := theirs.get(metric, [])[self.offset :]):
                detail["ratio"] = {"to": base.chosen.name} | stats.ratios(beside, samples).to_dict()
            found.append(row(metric, **rate.to_dict(), detail=detail, error=self.error))
        if plan.spec.kind == "causal":
            found.append(row("ttft_ms", **_milliseconds(self.first), detail={"n": len(self.first)}))
        if steps := [seconds for repetition in self.steps for seconds in repetition]:
            tail = {f"p{q}": stats.percentile(steps, q / 100) * 1e3 for q in (90, 99)}
            found.append(row("itl_ms", **_milliseconds(steps), detail={"n": len(steps)} | tail))
        if self.peak is not None:
            detail = {}
            if plan.spec.kind == "training" and self is not base and base.peak is not None:
                detail["ratio"] = {"to": base.chosen.name, "p50": base.peak / self.peak}
            found.append(row("peak_memory_mb", p50=self.peak / 1e6, detail=detail))
            if self.left is not None:
                found.append(row("model_memory_mb", p50=max(0, self.peak - self.left) / 1e6))
        if "perplexity" in self.accuracy:
            found.append(row("perplexity", p50=self.accuracy["perplexity"], detail={"tokens": plan.tokens}))
        return found


def _milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    return {name: value * 1e3 for name, value in stats.summary(seconds).to_dict().items()}


@contextlib.contextmanager
def _closing(runs: Sequence[_Run]) -> Iterator[None]:
    try:
        yield
    finally:
        for run in runs:
            run.close()
