"""Does a model still compute what its original computes?  Errors, distributions, and a verdict by the accuracy rule."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.checks import shape_text
from llmkern.table import render
from llmkern.testing.compare import Error, errors, spreads, unfaithful
from llmkern.testing.float64 import Float64
from llmkern.testing.monte_carlo import draws_of

__all__ = ["Accuracy", "verify"]

_LUCK = 16.0  # times what is allowed: beyond it no luck of the reference's is worth eight more runs
_ROWS_AT_A_TIME = 1024  # of the logits whose distributions are compared; bounds the fp64 copies


@dataclass(frozen=True)
class Accuracy:
    """A model's distance from its reference, and whether the accuracy rule allows it.

    max_abs: largest |model − reference|.
    rel: ‖model − reference‖ / ‖reference‖.
    kl: mean Kullback-Leibler divergence of the model's distribution from the reference's, in nats; None without logits.
    top1: share of positions where both have the same largest logit; None without logits.
    error, reference_error: largest distance of each from the reference computed in float64.
    allowed: largest `error` that the rule allows: 2 · reference_error + one rounding of the output's dtype.
    verdict: True where every value is a number, and `error` ≤ `allowed` or each error is one that rounding explains.
    sentence: the same for people.
    output: which output was compared (the worst, where there are several).  positions: how many (padding is left out).
    """

    max_abs: float
    rel: float
    kl: float | None
    top1: float | None
    error: float
    reference_error: float
    allowed: float
    verdict: bool
    sentence: str
    output: str
    positions: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; numbers that are infinite or NaN become None."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(self).items()
        }

    def __str__(self) -> str:
        rows = [
            ("largest difference from the reference", f"{self.max_abs:.3g}"),
            ("relative difference", f"{self.rel:.3g}"),
            ("mean KL divergence", None if self.kl is None else f"{self.kl:.3g} nats"),
            ("top-1 agreement", None if self.top1 is None else f"{self.top1:.2%}"),
            ("error against float64", f"{self.error:.3g}"),
            ("the reference's own error", f"{self.reference_error:.3g}"),
            ("allowed by the rule", f"{self.allowed:.3g}"),
        ]
        title = f"accuracy of {self.output}, {self.positions} positions"
        return render(title, ("measure", "value"), [row for row in rows if row[1] is not None]) + f"\n{self.sentence}"


def verify(model: nn.Module, reference: nn.Module, **inputs: Any) -> Accuracy:
    """Run both models on `inputs` and judge `model` by the accuracy rule.

    The rule (llmkern/testing/compare.py): the largest error of `model` against `reference` computed in float64 is at
    most twice the error of `reference` in its own precision, plus one rounding.  Where it is more, `reference` may
    have been lucky: then every value must be within what rounding at random makes of `reference`, run eight more
    times.  Nothing is copied: the float64 runs widen the operands of one operator at a time.

    inputs: what the models' forward takes, by keyword, on the models' device.  Where they contain a 2-D
    `attention_mask` (for a decoder's output `decoder_attention_mask`), only real positions are compared.
    Compared are `logits`, else `last_hidden_state`, else every floating tensor that forward returns.
    Both models run in eval mode without gradients; modes and everything else are as before afterwards.
    Raises ValueError where both are one model, their outputs differ in shape, or a model is on the meta device.
    """
    if model is reference:
        raise ValueError(
            "verify: model is the reference itself, so there is nothing to compare; "
            "load the model twice, or copy.deepcopy it before optimize_"
        )
    for name, each in (("model", model), ("reference", reference)):
        _check_materialised(name, each)
    if not inputs:
        raise ValueError("verify: no inputs were given, expected the forward's arguments by keyword (input_ids=…)")
    with _eval_mode(model, reference), torch.no_grad():
        outputs = outputs_of(model, inputs)
        expected = outputs_of(reference, inputs)
        own = _own(inputs)
        with Float64():  # torch.compile steps aside for a mode: compiled models run eagerly here
            exact = _compared(reference(**own))
        _check_same_outputs(outputs, expected)
        kept = _real_positions(inputs, reference)
        draws = functools.cache(lambda: draws_of(lambda: outputs_of(reference, inputs)))
        compared = [_compare(name, outputs[name], expected[name], exact[name], kept, draws) for name in outputs]
    return min(compared, key=lambda accuracy: (accuracy.verdict, accuracy.allowed - accuracy.error))


def _check_materialised(name: str, model: nn.Module) -> None:
    for path, parameter in model.named_parameters():
        # accelerate keeps offloaded weights on meta and fetches them in a hook.
        if parameter.is_meta and not any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise ValueError(f"verify: {name} has {path} on the meta device, expected a model with loaded weights")


@contextlib.contextmanager
def _eval_mode(*models: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode, and afterwards each in the mode that it was in."""
    before = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training


def outputs_of(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Run `model`; the tensors to compare, by name."""
    return _compared(model(**_own(inputs)))


def _own(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A cache among the inputs is written by the forward: each run gets its own."""
    return {name: value if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in inputs.items()}


def _compared(result: Any) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        return {"output": result}
    if isinstance(result, Mapping):
        for name in ("logits", "last_hidden_state"):
            if isinstance(result.get(name), Tensor):
                return {name: result[name]}
        named = dict(result)
    elif isinstance(result, (tuple, list)):
        named = {f"output {i}": value for i, value in enumerate(result)}
    else:
        named = {}
    found = {name: value for name, value in named.items() if isinstance(value, Tensor) and value.is_floating_point()}
    if not found:
        raise ValueError(f"verify: the forward returned {type(result).__name__}, expected a tensor or outputs with one")
    return found


def _check_same_outputs(outputs: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if outputs.keys() != expected.keys():
        raise ValueError(f"verify: model returns {', '.join(outputs)}, the reference {', '.join(expected)}")
    for name, output in outputs.items():
        if output.shape != expected[name].shape:
            raise ValueError(
                f"verify: {name} of model has shape {shape_text(output.shape)}, "
                f"expected {shape_text(expected[name].shape)} (the reference's)"
            )


def _real_positions(inputs: Mapping[str, Any], model: nn.Module) -> Tensor | None:
    """Return [batch, sequence], True for outputs that are not padding, or None if the inputs do not say."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        mask = inputs.get("decoder_attention_mask")
    else:
        mask = inputs.get("attention_mask")
        padding = inputs.get("src_key_padding_mask")  # torch.nn.TransformerEncoder: True is padding
        if mask is None and isinstance(padding, Tensor) and padding.dtype == torch.bool:
            mask = ~padding
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _compare(
    name: str,
    output: Tensor,
    expected: Tensor,
    exact: Tensor,
    kept: Tensor | None,
    draws: Callable[[], list[dict[str, Tensor]]],
) -> Accuracy:
    at: Any = ...
    if kept is not None and expected.dim() == 3 and kept.shape[0] == expected.shape[0]:
        # With a cache the mask covers the past too: the outputs are its last positions.
        kept = kept[:, -expected.shape[1] :]
        if kept.shape == expected.shape[:2]:
            at = kept
    output, expected, exact = output[at], expected[at], exact[at]
    error = errors(output, expected, exact)[0]
    if error.allowed < error.candidate <= _LUCK * error.allowed:
        (spread,) = spreads(exact, lambda: [draw[name][at] for draw in draws()])
        error = dataclasses.replace(error, explained=unfaithful(output, exact, spread) is None)
    gap = (output.double() - expected.double()).abs()
    norm = float(expected.double().norm())
    rel = float(gap.norm()) / norm if norm > 0 else float(gap.norm() > 0) and math.inf
    kl, top1 = _distributions(output, expected) if name == "logits" else (None, None)
    return Accuracy(
        max_abs=float(gap.max()) if gap.numel() else 0.0,
        rel=rel,
        kl=kl,
        top1=top1,
        error=error.candidate,
        reference_error=error.baseline,
        allowed=error.allowed,
        output=name,
        positions=math.prod(output.shape[:-1]),
        **_judge(name, output, expected, error),
    )


def _judge(name: str, output: Tensor, expected: Tensor, error: Error) -> dict[str, Any]:
    """`verdict` and `sentence`."""
    strange = ~output.isfinite()
    if bool(strange.any()):
        text = f"outside the rule: {int(strange.sum())} of {output.numel()} values of {name} are NaN or infinite"
        alike = bool((strange == ~expected.isfinite()).all())
        return {"verdict": False, "sentence": f"{text}, {'as' if alike else 'unlike'} in the reference"}
    if not bool(expected.isfinite().all()):
        text = f"outside the rule: the reference's own {name} has NaN or infinite values"
        return {"verdict": False, "sentence": text}
    numbers = f"error {error.candidate:.3g}, allowed {error.allowed:.3g} (the reference's own is {error.baseline:.3g})"
    return {"verdict": error.ok, "sentence": f"{'within' if error.ok else 'outside'} the rule: {numbers}"}


def _distributions(output: Tensor, expected: Tensor) -> tuple[float | None, float | None]:
    """Mean KL(reference ‖ model) in nats, and the share of equal largest logits."""
    rows, references = output.flatten(0, -2), expected.flatten(0, -2)
    if not rows.numel():
        return None, None
    divergence, equal = 0.0, 0
    for o, e in zip(rows.split(_ROWS_AT_A_TIME), references.split(_ROWS_AT_A_TIME), strict=True):
        log_q, log_p = o.double().log_softmax(-1), e.double().log_softmax(-1)
        # p = 0 contributes nothing, whatever q is.
        terms = torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q))
        divergence += float(terms.sum())
        equal += int((o.argmax(-1) == e.argmax(-1)).sum())
    # Rounding can leave a sum of exactly 0 slightly below it.
    return max(divergence / len(rows), 0.0) if math.isfinite(divergence) else divergence, equal / len(rows)
