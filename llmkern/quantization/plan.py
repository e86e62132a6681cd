"""Choose a linear layer's form under a scheme, by the measured output error of each candidate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkern import ops
from llmkern.nn import Int8Linear, PackedLinear, QuantizedLinear
from llmkern.nn.quantized_linear import weight_out_in
from llmkern.packed import BLOCK, PackedWeight
from llmkern.quantization.formats.blocks import (
    pack_groups,
    pack_groups_with_feedback,
    pack_int8_blocks,
    why_not_in_blocks,
)
from llmkern.quantization.layers import Layer
from llmkern.quantization.observe import MAX_ROWS, Observed
from llmkern.quantization.report import QuantRow
from llmkern.quantization.schemes import GROUPS, Groups, Int6, Int8, LayerScheme

__all__ = ["Plan", "plan_layer", "relative_error"]

MAX_WEIGHT_ONLY_ERROR = 0.05
"""A layer whose output error is larger even with int8 weights stays in floating point.  1% is what those cost."""


def prefers_blocks(module: nn.Module) -> bool:
    """Return True if int8 in blocks of 32 is multiplied faster here than int8 weights with floating-point activations.

    On the CPU: its products of integers take less than half as long as fp32's and read a weight of few rows as fast.
    """
    return weight_out_in(module).device.type == "cpu"


@dataclass(frozen=True)
class Plan:
    """Decision about a layer: its replacement, or the scales that its weight, left as it is, must follow."""

    layer: Layer
    row: QuantRow
    replacement: QuantizedLinear | None = None
    rescale: Tensor | None = None


def plan_layer(
    layer: Layer, observed: Observed, s: Tensor | None, scheme: LayerScheme | None, *, is_head: bool
) -> Plan:
    """Choose the layer's form.

    s: what its input channels are multiplied by (`smooth.py`); None for nothing.  scheme: None leaves it.
    is_head: whether it gives the logits, which are too many to lose much: weight-only int8 by channel, or 6 bits in
        groups where the scheme is one of groups.
    """
    if layer.reason or scheme is None:
        return Plan(layer, _row(layer, "left", layer.reason or "the scheme names no format for it"))
    columns = layer.shape[1]
    reason = why_not_in_blocks(*layer.shape, BLOCK)
    if isinstance(scheme, Int8) and (is_head or scheme.block is None):
        return _plan_int8(layer, observed, s, scheme.max_error, is_head=is_head)
    if reason:
        max_error = scheme.max_error if isinstance(scheme, Int8) else Int8.max_error
        return _plan_int8(layer, observed, s, max_error, is_head=is_head, because=reason)
    if is_head and isinstance(scheme, Groups) and scheme.code_bits < Int6.code_bits:
        scheme = Int6(scheme.group, scheme.max_error, scheme.smooth)
    return _plan_packed(layer, observed, s, _candidates(scheme, layer.module, observed, s, columns))


@dataclass(frozen=True)
class _Candidate:
    """A form that a packed layer may have.  reason: why it is not what was asked for, or ""."""

    pack: Callable[[Tensor], PackedWeight]
    max_error: float
    reason: str = ""


def _candidates(
    scheme: LayerScheme, module: nn.Module, observed: Observed, s: Tensor | None, columns: int
) -> Iterator[_Candidate]:
    """Return the candidates, the narrowest first."""
    if isinstance(scheme, Groups):
        group = max(size for size in GROUPS if size <= scheme.group and columns % size == 0)
        yield _Candidate(
            partial(_pack_groups, scheme=scheme, group=group, module=module, observed=observed, s=s),
            scheme.max_error,
            "" if group == scheme.group else f"its {columns} columns are no multiple of {scheme.group}",
        )
    yield _Candidate(pack_int8_blocks, MAX_WEIGHT_ONLY_ERROR)


def _pack_groups(
    weight: Tensor, *, scheme: Groups, group: int, module: nn.Module, observed: Observed, s: Tensor | None
) -> PackedWeight:
    """s: what the weight has been multiplied by, and its inputs will be divided by."""
    rows = observed.rows.get(module)
    if module in observed.products:
        products, count = observed.products[module]
        if s is not None:
            products = products / torch.outer(s, s).to(products)
        return pack_groups_with_feedback(
            weight, products.to(weight.device), count, group, bits=scheme.code_bits, symmetric=scheme.symmetric
        )
    if rows is not None and s is not None:
        rows = rows / s.to(rows)
    importance = None if rows is None else rows.float().square().mean(0).to(weight.device)
    return pack_groups(weight, group, bits=scheme.code_bits, symmetric=scheme.symmetric, importance=importance)


def _plan_packed(layer: Layer, observed: Observed, s: Tensor | None, candidates: Iterator[_Candidate]) -> Plan:
    module = layer.module
    weight = weight_out_in(module).detach()
    weight = weight if s is None else weight * s.to(weight)
    rows = observed.rows.get(module)
    unseen = bool(observed.rows) and rows is None
    failed, weight_error = "", 0.0

    def row(action: str, why: str, error: float | None) -> QuantRow:
        return _row(layer, action, why, weight_error, error, smoothed=s is not None)

    for candidate in candidates:
        packed = PackedLinear.from_linear(module, candidate.pack(weight))
        weight_error = relative_error(weight.float(), packed.dequantized_weight(torch.float32))
        error = None if unseen else _output_error(module, s, rows, _without_bias(packed))
        reason = failed or candidate.reason or ("no input reached it" if unseen else "")
        if error is None or error <= candidate.max_error:
            return Plan(layer, row(packed.kind, reason, error), packed)
        failed = f"its {packed.kind} error is {100 * error:.1f}%, beyond {100 * candidate.max_error:g}%"
    return Plan(layer, row("left", failed, error), rescale=s)


def _without_bias(packed: PackedLinear) -> Callable[[Tensor], Tensor]:
    w = packed.packed
    arguments = {name: getattr(w, name) for name in ("zero", "offset", "super_scale", "super_offset")}
    return lambda rows: ops.quantized_linear(rows, w.codes, w.scale, **arguments, code=w.code, n=w.n)


def _plan_int8(
    layer: Layer,
    observed: Observed,
    s: Tensor | None,
    max_error: float,
    *,
    is_head: bool = False,
    because: str = "",
) -> Plan:
    """int8 by channel; beyond `max_error` in blocks, and beyond it even so weight-only, as a head is.

    because: why it is not in blocks, where those were asked for.
    """
    module = layer.module
    int8 = Int8Linear.from_linear(module) if s is None else _smoothed(module, s)
    weight = weight_out_in(module).detach()
    target = weight if s is None else weight * s.to(weight)
    weight_error = relative_error(target.float(), int8.dequantized_weight(torch.float32))

    def row(action: str, why: str, error: float | None) -> QuantRow:
        return _row(layer, action, why, weight_error, error, smoothed=s is not None)

    if observed.rows and module not in observed.rows:
        int8.scheme = "w8a16"
        return Plan(layer, row("int8 weight-only", "no input reached it", None), int8)
    rows = observed.rows.get(module)

    def multiply(scheme: str) -> Callable[[Tensor], Tensor]:
        return lambda x: ops.int8_linear(x, int8.codes, int8.weight_scale, scheme=scheme)

    error = _output_error(module, s, rows, multiply("w8a8"))
    if error <= max_error and not is_head:
        return Plan(layer, row("int8 w8a8", because, error), int8)
    beyond = f"its W8A8 error is beyond {100 * max_error:g}%"
    if not is_head and max_error > 0 and prefers_blocks(module) and not why_not_in_blocks(*layer.shape, BLOCK):
        blocks = _plan_packed(layer, observed, s, iter([_Candidate(pack_int8_blocks, max_error, beyond)]))
        if blocks.replacement is not None:
            return blocks
    floor = _output_error(module, s, rows, multiply("w8a16"))
    if not floor <= MAX_WEIGHT_ONLY_ERROR:
        why = f"even weight-only its error is {100 * floor:.1f}%, beyond {100 * MAX_WEIGHT_ONLY_ERROR:g}%"
        return Plan(layer, row("left", why, error), rescale=s)
    int8.scheme = "w8a16"
    return Plan(layer, row("int8 weight-only", "it is the output head" if is_head else beyond, error), int8)


def _row(
    layer: Layer,
    action: str,
    reason: str,
    weight_error: float | None = None,
    error: float | None = None,
    *,
    smoothed: bool = False,
) -> QuantRow:
    return QuantRow(layer.path, layer.kind, layer.shape, action, weight_error, error, smoothed, reason)


def _smoothed(module: nn.Module, s: Tensor) -> Int8Linear:
    """Return the int8 layer of the weight times `s`."""
    int8 = Int8Linear.from_linear(module)
    weight = weight_out_in(module).detach()
    codes, scale = ops.quantize_int8(weight * s.to(weight))
    int8.hold(nn.Parameter(codes, requires_grad=False), scale)
    return int8


def relative_error(wanted: Tensor, got: Tensor) -> float:
    """Return ‖got − wanted‖ / ‖wanted‖, or 0 if `wanted` is 0."""
    size = wanted.norm()
    return float((got - wanted).norm() / size) if size > 0 else 0.0


def _output_error(
    module: nn.Module, s: Tensor | None, rows: Tensor | None, multiply: Callable[[Tensor], Tensor]
) -> float:
    """Root mean square over the rows of ‖y − ŷ‖ / ‖y‖, before the bias; of normal noise where no rows were seen.

    multiply: the quantized product of rows, which are divided by `s` before.
    """
    weight = weight_out_in(module).detach().float()
    if rows is None:
        rows = torch.randn(MAX_ROWS // 4, weight.shape[1], generator=torch.Generator().manual_seed(0), device="cpu")
    rows = rows.float().to(weight.device)
    wanted = F.linear(rows, weight)
    got = multiply(rows if s is None else rows / s.to(rows))
    size = wanted.norm(dim=-1)
    relative = ((got - wanted).norm(dim=-1) / size)[size > 0]
    return float(relative.square().mean().sqrt()) if relative.numel() else 0.0
