"""Quantize linear layers in place, each as far as its measured error allows: `quantize_`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llmkern.memory import move_to_huge_pages_
from llmkern.nn import Int8Embedding, Int8Linear, PackedEmbedding, PackedLinear, QuantizedLinear
from llmkern.nn._quantized_weight import QuantizedWeight
from llmkern.nn.quantized_embedding import QuantizedEmbedding
from llmkern.nn.quantized_linear import weight_out_in
from llmkern.quantization.budget import widened
from llmkern.quantization.checkpoint import describe_in_config
from llmkern.quantization.embeddings import EmbeddingLayer, find_embeddings, heads_of
from llmkern.quantization.inputs import RANDOM_SHAPE, calibration_batches, random_tokens
from llmkern.quantization.layers import FilterFn, Layer, find_layers, put
from llmkern.quantization.methods import give_methods
from llmkern.quantization.observe import Observed, observe
from llmkern.quantization.plan import Plan, plan_layer, relative_error
from llmkern.quantization.report import QuantReport, QuantRow, record_report, tensor_bytes
from llmkern.quantization.schemes import ByLayer, Groups, Int4, LayerScheme, Scheme, scheme_named
from llmkern.quantization.sensitivity import divergences
from llmkern.quantization.smooth import Fold, plan_folds
from llmkern.quantization.undo import plainly, undoing

__all__ = ["quantize_"]

MOST_PRODUCTS = 8 << 30
"""Bytes of the inputs' products at most; beyond it errors are not made up for."""

Model = TypeVar("Model", bound=nn.Module)
Found = TypeVar("Found", Layer, EmbeddingLayer)


@torch.inference_mode(mode=False)  # weights made within one can never be trained
def quantize_(
    model: Model,
    scheme: Scheme | str | Mapping[str, Scheme | str | None] = "int8",
    *,
    skip: Sequence[str] = (),
    filter_fn: FilterFn | None = None,
    calib: Any = None,
    tokenizer: Any = None,
) -> Model:
    """Give linear layers and GPT-2's Conv1D weights of few bits, in place; `llmkern.report(model)` has a row for each.

    scheme: what is asked for, as a string, a dataclass, or a dict of these by layer (a name, a run of whole parts of
        one, or a pattern with `*`; the first that fits counts, None and no pattern leave a layer):
        "int8": `Int8(max_error=0.025, smooth=True)`, one scale per output channel, amax / 127, and per token;
        "int8-block": `Int8(block=32)`, one for each 32 neighbours, on both sides: nearly lossless;
        "int4": `Int4(group=128, bits=4.7)`, "int4-g32": `Int4(group=32, bits=None)`, weights of 16 levels, their scales
        found by a search, activations as in "int8-block"; "int5" and "int6": `Int5()` and `Int6()`, more levels.
        A checkpoint carries it.  max_error=0 makes every layer of "int8" weight-only.
    Each layer's output error is measured on the inputs it sees in a forward of the floating-point model, and decides
    (errors: root mean square over tokens of ‖y − ŷ‖ / ‖y‖).  A layer of int8 by channel:
        W8A8 error ≤ max_error                        "int8 w8a8": per-token dynamic int8 activations
        beyond it, on the CPU in blocks ≤ max_error   "int8-block"
        beyond it, weight-only error ≤ 5%             "int8 weight-only"
        beyond all                                    "left" in floating point, with the reason
    One of int4 whose error is beyond `Int4.max_error` gets int8 in blocks, and is left beyond 5% of that; so is one of
    int8 in blocks.  Columns that are no multiple of 32 have no blocks, and get int8 by channel.
    In a language model, layers of int4 that cost its predictions the most get narrower groups or more bits, until
    a weight takes `Int4.bits` in the mean; the report has each layer's KL divergence, as one backward pass on the same
    inputs estimates it (`quantization/sensitivity.py`).  Of SmolLM2-135M off its grid, on 4,096 tokens of news,
    perplexity is 1.042 of fp32's and the mean KL divergence 0.060, at 0.159 of its size.
    An output head is int8 by channel and weight-only, or under the schemes of groups int6, unless a dict names another
    for it.  With it goes the embedding tied to it, which shares its codes and scales; another input embedding of a
    language model is int8 by channel; tables of positions and types stay in floating point.  transformers'
    `resize_token_embeddings` keeps the codes of the tokens that stay, and `tie_weights` ties scales as well.
    Smoothing, of int8: where a norm's output goes to quantized layers alone, its loud channels are divided
    by a power of two and the weights multiplied by it, which leaves the floating-point model the same to the bit
    (SmoothQuant, arXiv:2211.10438, α = 0.4; `quantization/smooth.py`).

    skip: module names, or runs of whole parts of them: "lm_head", "mlp.down_proj", "layers.0", "h.3.attn.c_proj".
    filter_fn: takes (module, path), as torchao's does; a layer for which it is false is left.  It warns where that
        leaves nothing.
    calib: a list of texts (then `tokenizer` too; each is cut at 512 tokens), of tensors (the model's first
        argument) or of dicts (keyword arguments).  Each column's error of int4 is then made up for by the columns after
        it (GPTQ, arXiv:2210.17323).  A transformers model that takes input_ids is run on 4×128 random tokens as well,
        always the same, and on these alone without calib; for other models the errors are then those of normal noise,
        nothing is smoothed, and the report says so.  Scales of int4 are searched for the least error on these inputs.
    Left alone whatever is asked: layers that share their weight with anything but plain embeddings, subclasses of
    nn.Linear that compute something else, subclasses of nn.Embedding (scaled embeddings, for one), embeddings with
    max_norm, layers with a forward of their own on the instance, adapters, and layers whose weight was read during
    that forward without the layer being called.
    On the CPU what the model then holds is copied to huge pages, as `optimize_` does, and the floating-point
    checkpoint's memory is given back.
    A transformers model's config then describes the quantization, so that `save_pretrained` gives a
    compressed-tensors checkpoint; `load_` reads it back, `dequantize_` undoes all but the rounding.
    Returns the model.  Called again it quantizes what is in floating point by then: what was left before, and layers
    whose weight was written since (`nn.QuantizedLinear`), as merging an adapter does.
    Raises TypeError and ValueError for bad arguments, for a model on the meta device, without linear layers, or
    with nothing left to quantize.  Whatever is raised, the model is as it was.

    Measured on SmolLM2-135M-Instruct, fp32, 4,096 tokens of news in windows of 512: perplexity +0.78% and 93.57% of
    the floating-point model's first choices, where layers beyond max_error (64 of 210, 27 of 30 down_proj) have
    blocks; +0.80% and 93.40% where these are weight-only.  Weight-only also in what follows, 20,480 tokens; perplexity
    of "int8" over the floating-point model's 30.845:
        as it comes +0.83%          calib= 8 articles +0.58%      max_error=0 (weight-only) +0.40%
        the same with head and embedding in floating point +0.89% and +0.61%; they alone in int8 +0.09%
        as it comes, but with the head in W8A8 +1.45%: why it is weight-only
    On 24,576 tokens, without the head: smooth=False +0.65% (where as it comes was +0.85%), max_error=1 +2.14%.
    all-MiniLM-L6-v2: mean cosine of 96 sentences' embeddings with fp32's 0.99920, weight-only 0.99903.
    Searching each channel's clip for the least squared weight error, instead of amax, made perplexity worse by
    0.3% on 4,096 tokens, and is not done.  Few tokens at a time are decoded at the same speed whatever max_error is
    (`ops.int8_linear`, "auto"); max_error=1 makes long inputs the faster ones.
    """
    with plainly():
        _quantize(model, scheme_named(scheme), skip, filter_fn, calib, tokenizer)
    return model


def _quantize(
    model: nn.Module, scheme: Scheme, skip: Sequence[str], filter_fn: FilterFn | None, calib: Any, tokenizer: Any
) -> None:
    _check(model, skip, filter_fn)
    asked: list[bool] = []
    layers = find_layers(model, skip, filter_fn and _noting(filter_fn, asked))
    schemes = {layer.module: scheme.of(layer.path) if isinstance(scheme, ByLayer) else scheme for layer in layers}
    wanted = [layer.module for layer in layers if not layer.reason and schemes[layer.module] is not None]
    _check_layers(model, layers, wanted)
    if asked and not any(asked):
        warnings.warn("quantize_: filter_fn is false for every layer; nothing is quantized", UserWarning, stacklevel=4)
    if isinstance(scheme, ByLayer) and not wanted:
        names = ", ".join(repr(pattern) for pattern, _ in scheme.patterns)
        raise ValueError(f"quantize_: scheme names no layer that can be quantized ({names})")
    heads = heads_of(model, layers)
    before = tensor_bytes(model)
    grouped = [module for module in wanted if isinstance(schemes[module], Groups)]
    observed, measured_on, batches = _observe(model, wanted, calib, tokenizer, grouped)
    layers = [_unless_read(layer, observed) for layer in layers]
    embeddings = [_unless_read(table, observed) for table in find_embeddings(model, layers, skip, filter_fn)]
    # What is folded into a head would be missing from the embedding tied to it, or change what others read.
    fixed = heads | observed.read_elsewhere | {module for module, own in schemes.items() if not _smooths(own)}
    possible = plan_folds(observed) if any(map(_smooths, schemes.values())) else []
    folds = [fold for fold in possible if fixed.isdisjoint(fold.layers)]
    scale_of = {layer: fold.s for fold in folds for layer in fold.layers}
    tied = {table.head.module for table in embeddings if table.head is not None}

    def plan(layer: Layer, own: LayerScheme | None) -> Plan:
        is_head = layer.module in heads and (not isinstance(scheme, ByLayer) or layer.module in tied)
        return plan_layer(layer, observed, scale_of.get(layer.module), own, is_head=is_head)

    plans = [plan(layer, schemes[layer.module]) for layer in layers]
    plans = _within_budget(model, plans, schemes, scale_of, batches, plan)
    if isinstance(scheme, ByLayer):
        embeddings = [_unless_unnamed(table, scheme) for table in embeddings]
    made = {id(plan.layer.module): plan.replacement for plan in plans}
    tables = [_plan_embedding(found, made) for found in embeddings]
    with undoing(model) as undo:
        _install(plans, folds, undo.save)
        for found, _row, table in tables:
            if table is not None:
                put(found.places, table)
        describe_in_config(model, scheme)
    give_methods(model)
    # Codes and what is left in floating point alike: the file of a checkpoint stays mapped for its last tensor.
    move_to_huge_pages_(model)
    rows = (*(row for _, row, _ in tables), *(plan.row for plan in plans))
    record_report(model, QuantReport(rows, measured_on, before, tensor_bytes(model)))


def _within_budget(
    model: nn.Module,
    plans: list[Plan],
    schemes: Mapping[nn.Module, LayerScheme | None],
    scale_of: Mapping[nn.Module, Tensor],
    batches: Sequence[dict[str, Any]],
    replan: Callable[[Layer, LayerScheme | None], Plan],
) -> list[Plan]:
    """Return the plans, with what each layer in int4 costs; where it is the most they are wider (`Int4.bits`)."""
    four: dict[Int4, list[Plan]] = {}
    for plan in plans:
        own = schemes[plan.layer.module]
        if isinstance(own, Int4) and own.bits is not None and plan.row.action.startswith("int4"):
            four.setdefault(own, []).append(plan)
    measured = [plan for group in four.values() for plan in group]
    changes = {plan.layer.module: partial(_change, plan, scale_of.get(plan.layer.module)) for plan in measured}
    try:
        costs = divergences(model, batches, changes)
    except Exception as error:  # of whatever kind: not every model has gradients
        why = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(f"quantize_: no gradients, so Int4.bits is not used ({why[0]:.100})", UserWarning, stacklevel=6)
        costs = {}
    instead: dict[Plan, Plan] = {}
    for own, group in four.items():
        instead |= widened(group, costs, own, lambda plan, wider: replan(plan.layer, wider))
    return [
        replace(now := instead.get(plan, plan), row=replace(now.row, divergence=costs.get(plan.layer.module)))
        for plan in plans
    ]


def _change(plan: Plan, s: Tensor | None) -> Tensor:
    """Return by how much a plan changes the layer's weight, before anything is folded into it."""
    assert plan.replacement is not None
    weight = plan.replacement.dequantized_weight(torch.float32)
    return (weight if s is None else weight / s.to(weight)) - weight_out_in(plan.layer.module).detach().float()


def _check(model: nn.Module, skip: Sequence[str], filter_fn: Callable[..., Any] | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_: model is a {type(model).__name__}, expected an nn.Module")
    if isinstance(skip, str) or not all(isinstance(name, str) for name in skip):
        raise TypeError(f"quantize_: skip is {skip!r}, expected a sequence of module names")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"quantize_: filter_fn is a {type(filter_fn).__name__}, expected a function of (module, path)")
    for name, tensor in model.named_parameters():
        if tensor.device.type == "meta":
            raise ValueError(f"quantize_: {name} is on the meta device, which has no values to quantize")


def _check_layers(model: nn.Module, layers: list[Layer], wanted: list[nn.Module]) -> None:
    packed = [(path, module) for path, module in model.named_modules() if isinstance(module, QuantizedWeight)]
    if packed and not wanted:
        path, module = packed[0]
        raise ValueError(f"quantize_: model is quantized already ({path or 'it'} is an {type(module).__name__})")
    if not layers:
        raise ValueError("quantize_: model has no nn.Linear and no Conv1D")


def _noting(filter_fn: FilterFn, answers: list[bool]) -> FilterFn:
    def noting(module: nn.Module, path: str) -> bool:
        answers.append(bool(filter_fn(module, path)))
        return answers[-1]

    return noting


def _unless_read(found: Found, observed: Observed) -> Found:
    """Return the layer or embedding; marks it as left if code outside it reads its weight."""
    if found.reason or found.module not in observed.read_elsewhere:
        return found
    return replace(found, reason="its weight is read without the layer being called, which is slower from int8")


def _unless_unnamed(found: EmbeddingLayer, scheme: ByLayer) -> EmbeddingLayer:
    """Return the embedding; marks it as left if the scheme names neither it nor the head that shares its weight."""
    if found.reason or found.head is not None or scheme.of(found.path) is not None:
        return found
    return replace(found, reason="the scheme names no format for it")


def _smooths(scheme: LayerScheme | None) -> bool:
    """Return True if this scheme allows folding a layer's outlier channels into its weight."""
    return scheme is not None and scheme.smooth


def _observe(
    model: nn.Module, layers: list[nn.Module], calib: Any, tokenizer: Any, grouped: list[nn.Module]
) -> tuple[Observed, str, list[dict[str, Any]]]:
    """Return the layers' inputs, a phrase for their source, and the model's inputs.

    grouped: those of few bits in groups, whose errors are made up for where there are real inputs.
    """
    if calib is not None:
        batches = calibration_batches(model, calib, tokenizer)
        needed = sum(4 * weight_out_in(module).shape[1] ** 2 for module in grouped)
        products_of = grouped if needed <= MOST_PRODUCTS else []
        # Prose has no tokens of a chat, and a model smoothed for prose alone may answer nonsense.
        others = random_tokens(model)
        more = f" and {RANDOM_SHAPE[0]}×{RANDOM_SHAPE[1]} random tokens" if others else ""
        observed = observe(model, layers, batches, products_of, others)
        return observed, f"{len(batches)} calibration inputs{more}", batches
    batches = random_tokens(model)
    if not batches:
        return Observed(), "normal noise (calib= measures on real inputs, and smooths)", []
    try:
        count, length = RANDOM_SHAPE
        return observe(model, layers, batches), f"{count}×{length} random tokens", batches
    except Exception as error:  # whatever a model says of inputs that nobody but us chose
        why = str(error).strip().splitlines() or [type(error).__name__]
        return Observed(), f"normal noise, as random tokens failed ({why[0]:.100}); calib= measures on real inputs", []


def _plan_embedding(
    found: EmbeddingLayer, made: dict[int, QuantizedLinear | None]
) -> tuple[EmbeddingLayer, QuantRow, QuantizedEmbedding | None]:
    """Return the table in int8, or with the codes and scales of the head that has the same weight."""
    weight = found.module.weight.detach()
    shape = (weight.shape[0], weight.shape[1])
    head = None if found.head is None else made[id(found.head.module)]
    reason = found.reason
    if not reason and found.head is not None and head is None:
        reason = f"its weight is shared with {found.head.path}, which is left"
    if reason:
        return found, QuantRow(found.path, "Embedding", shape, "left", None, None, False, reason), None
    if head is None:
        table: QuantizedEmbedding = Int8Embedding.from_embedding(found.module)
    elif isinstance(head, Int8Linear):
        table = Int8Embedding.tied(found.module, head)
    else:
        assert isinstance(head, PackedLinear)
        table = PackedEmbedding.tied(found.module, head)
    error = relative_error(weight.float(), table.dequantized_weight(torch.float32))
    why = "its rows are looked up" if found.head is None else f"it shares the weight of {found.head.path}"
    action = "int8 weight-only" if isinstance(table, Int8Embedding) else table.format_name
    return found, QuantRow(found.path, "Embedding", shape, action, error, None, False, why), table


def _install(plans: list[Plan], folds: list[Fold], save: Callable[[Tensor], None]) -> None:
    for fold in folds:
        for name in fold.parameters:
            save(fold.norm._parameters[name])  # type: ignore[arg-type]
        fold.apply()
    for plan in plans:
        if plan.rescale is not None:
            module = plan.layer.module
            save(module.weight)  # type: ignore[arg-type]
            with torch.no_grad():
                weight = weight_out_in(module)
                weight.mul_(plan.rescale.to(weight))
    for plan in plans:
        if plan.replacement is not None:
            put(plan.layer.places, plan.replacement)
