"""Every family of models, untouched beside optimized: published shapes of few layers, random weights, one process.

Outputs are judged before they are timed: floating point by the accuracy rule against float64, int8 by its cosine with
the untouched fp32 model.  Both sides then take turns, step by step, on the same tokens.
"""

from __future__ import annotations

import copy
import gc
import importlib.resources
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.bench import stats
from llmkern.bench.schema import Row
from llmkern.memory import give_back
from llmkern.report import report
from llmkern.swap import optimize_
from llmkern.testing.compare import assert_as_accurate
from llmkern.testing.float64 import Float64

__all__ = ["DTYPES", "Family", "Sizes", "families", "measure_family"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}
"""int8: weights and activations of the linear layers, in a model that else computes in fp32; beside untouched fp32."""

LEAST_COSINE = 0.99
VOCABULARY = 4096
_LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers",
)  # fmt: skip
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "cls_token_id": 1,
    "sep_token_id": 2,
}


@dataclass(frozen=True)
class Sizes:
    """layers: at most; tokens: of a prompt or of what is encoded; steps: tokens decoded in each round; seconds: of
    measuring for each dtype, but at least `rounds` rounds; parameters: as many fit, in layers, so that two models in
    fp32 and what is packed at the moment stay under 8 GB."""

    layers: int = 6
    tokens: int = 128
    steps: int = 16
    rounds: int = 5
    seconds: float = 4.0
    parameters: int = 750_000_000


@dataclass(frozen=True)
class Family:
    """of: the checkpoint whose numbers `config` holds; experts: as many are built, all where it is None."""

    of: str
    model: str
    config: dict[str, Any]
    input: str = "tokens"
    experts: int | None = None
    config_class: str | None = None

    def settings(self, layers: int) -> Any:
        """transformers' config, with the layers, experts and vocabulary cut."""
        import transformers

        values: dict[str, Any] = {**self.config}
        values |= {name: min(layers, values[name]) for name in _LAYERS if name in values}
        if self.experts is not None:
            values |= {name: self.experts for name in _EXPERTS if name in values}
        if "vocab_size" in values:
            values |= {"vocab_size": min(VOCABULARY, values["vocab_size"]), **_TOKENS}
        made: Any = getattr(transformers, self.model)
        return (getattr(transformers, self.config_class) if self.config_class else made.config_class)(**values)

    def build(self, layers: int, most: int) -> tuple[nn.Module, int]:
        """Random weights in fp32, and the number of layers: at most `layers`, fewer where these have more
        than `most` parameters."""
        import transformers

        make: Any = getattr(transformers, self.model)
        for count in range(layers, 0, -1):
            with torch.device("meta"):
                parameters = sum(p.numel() for p in make(self.settings(count)).parameters())
            if parameters <= most:
                break
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make(self.settings(count)).eval(), count


def families() -> dict[str, Family]:
    """Every family, by name."""
    text = importlib.resources.files("llmkern.bench") / "models" / "families" / "published.json"
    return {name: Family(**values) for name, values in json.loads(text.read_text(encoding="utf-8")).items()}


def _inputs(family: Family, config: Any, tokens: int) -> dict[str, Tensor]:
    """One input of the family's kind, in fp32 where it is floating."""
    draw = torch.Generator().manual_seed(1)
    if family.input == "image":
        return {"pixel_values": torch.randn(1, 3, config.image_size, config.image_size, generator=draw)}
    if family.input == "waveform":
        return {"input_values": torch.randn(1, 16_000, generator=draw)}
    if family.input == "spectrogram":
        frames = 2 * config.max_source_positions
        return {"input_features": torch.randn(1, config.num_mel_bins, frames, generator=draw)}
    return {"input_ids": torch.randint(3, config.vocab_size, (1, tokens), generator=draw)}


class _Side:
    """A model with what its phases share.  Tokens are given, not chosen: both sides do the same work."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], cache: Callable[[Any], Any]) -> None:
        self.model: Any = model
        self.cache, self.state = cache, dict[str, Any]()
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
        self.token = torch.full((1, 1), 5)
        self.both = bool(getattr(model.config, "is_encoder_decoder", False))
        self.decodes = self.both or bool(model.can_generate())  # type: ignore[operator]

    @property
    def phase(self) -> str:
        return "prefill" if self.decodes and not self.both else "encode"

    def first(self) -> Tensor:
        if self.both:
            encoded = self.model.get_encoder()(**self.inputs)
            self.state = {"encoder_outputs": encoded, "past_key_values": None}
            return encoded.last_hidden_state
        if not self.decodes:
            return self.model(**self.inputs).last_hidden_state
        return self._past(self.model(**self.inputs, past_key_values=self.cache(self.model.config), use_cache=True))

    def step(self) -> Tensor:
        name = "decoder_input_ids" if self.both else "input_ids"
        return self._past(self.model(**{name: self.token}, **self.state, use_cache=True))

    def _past(self, out: Any) -> Tensor:
        self.state["past_key_values"] = out.past_key_values
        return out.logits

    def outputs(self) -> list[Tensor]:
        """Both phases; of decoding two steps, the first of which may fill the cache."""
        return [self.first(), *([self.step(), self.step()] if self.decodes else [])]


def _sides(family: Family, base: nn.Module, dtype: str, tokens: int) -> tuple[_Side, _Side]:
    from transformers import DynamicCache

    from llmkern import KVCache
    from llmkern.quantization import quantize_

    inputs = _inputs(family, base.config, tokens)
    other = copy.deepcopy(base).to(DTYPES[dtype])
    untouched = base if DTYPES[dtype] == torch.float32 else copy.deepcopy(other)
    if dtype == "int8":
        quantize_(other, "int8")
    optimize_(other, on_unsupported="ignore")
    return _Side(untouched, inputs, lambda config: DynamicCache(config=config)), _Side(other, inputs, KVCache)


def _judged(untouched: _Side, optimized: _Side, dtype: str) -> dict[str, Any]:
    """The numbers; AssertionError where the optimized model is wrong."""
    base, out = untouched.outputs(), optimized.outputs()
    if dtype == "int8":
        pairs = zip(base, out, strict=True)
        cosine = min(float(nn.functional.cosine_similarity(a.double(), b.double(), -1).mean()) for a, b in pairs)
        if not cosine >= LEAST_COSINE:
            raise AssertionError(f"cosine {cosine:.5f} with the untouched model, at least {LEAST_COSINE} is accepted")
        return {"cosine": cosine}
    with Float64():
        exact = untouched.outputs()
    assert_as_accurate(out, baseline=base, exact=exact)
    error, own = (max(float((a.double() - e).abs().max()) for a, e in zip(o, exact, strict=True)) for o in (out, base))
    return {"error": error, "baseline": own}


def _layers(model: nn.Module) -> str:
    """ "whole", or how many layers are and why the others are not."""
    swap = report(model).swap
    rows = [row for row in (swap or ()) if row.kind == "layer"]
    reasons = dict.fromkeys(row.reason for row in rows if row.action == "left")
    whole = sum(row.action == "swapped" for row in rows)
    if not reasons:
        return "whole" if whole else "no layer was recognised"
    return "; ".join([*([f"{whole} whole"] if whole else []), *reasons])


def measure_family(name: str, family: Family, dtypes: Sequence[str], sizes: Sizes) -> list[Row]:
    """Rows of each dtype and phase; a dtype that fails, or is judged wrong, is a row with its error."""
    rows: list[Row] = []
    with torch.inference_mode(False), torch.no_grad():
        base, layers = family.build(sizes.layers, sizes.parameters)
        for dtype in dtypes:
            x = {"dtype": dtype, "of": family.of, "layers": layers, "tokens": sizes.tokens}
            try:
                rows += _measured(name, x, _sides(family, base, dtype, sizes.tokens), sizes)
            except Exception as error:
                said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                said = f"not timed, the result is wrong: {said}" if isinstance(error, AssertionError) else said
                rows.append(Row("families", name, "llmkern", "phases_per_s", x | {"phase": "–"}, error=said))
            gc.collect()
            give_back()
    return rows


def _measured(name: str, x: dict[str, Any], sides: tuple[_Side, _Side], sizes: Sizes) -> list[Row]:
    accuracy, layers = _judged(*sides, x["dtype"]), _layers(sides[1].model)
    first: tuple[list[float], list[float]] = ([], [])
    steps: tuple[list[float], list[float]] = ([], [])
    begin = time.perf_counter()
    while len(first[0]) < sizes.rounds or time.perf_counter() - begin < sizes.seconds:
        _turn(sides, first, "first")
        for _ in range(sizes.steps + 1 if sides[0].decodes else 0):
            _turn(sides, steps, "step")
        for taken in steps if sides[0].decodes else ():
            del taken[-sizes.steps - 1]  # of an encoder-decoder it fills the cache from the encoder's output
    rows = []
    for phase, (theirs, ours) in ((sides[0].phase, first), ("decode", steps)):
        if ours:
            rates = stats.summary([1 / seconds for seconds in ours])
            beside = stats.summary([1 / seconds for seconds in theirs]).to_dict()
            ratio = {"to": "untouched"} | stats.ratios(ours, theirs).to_dict()
            detail = {"n": rates.n, "ratio": ratio, "untouched": beside, "layers": layers}
            row = Row("families", name, "llmkern", "phases_per_s", x | {"phase": phase})
            row.p20, row.p50, row.p80 = rates.p20, rates.p50, rates.p80
            row.accuracy, row.detail = accuracy, detail
            rows.append(row)
    return rows


def _turn(sides: tuple[_Side, _Side], taken: tuple[list[float], list[float]], what: str) -> None:
    """Time one call of each side; who begins alternates."""
    order = (0, 1) if len(taken[0]) % 2 == 0 else (1, 0)
    for i in order:
        start = time.perf_counter()
        getattr(sides[i], what)()
        taken[i].append(time.perf_counter() - start)
