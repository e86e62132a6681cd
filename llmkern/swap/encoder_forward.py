"""The forward of an encoder layer that was swapped as a whole: one op where it can be, else the layer's own forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmkern import ops
from llmkern.integrations.transformers.attention import HARMLESS
from llmkern.swap.whole_layer import (
    LinearPart,
    NormPart,
    NotServed,
    check_arguments,
    check_guard,
    computed,
    eps_of,
    layer_mask,
    linear_arguments,
    norm_parameter,
    run_parts,
    scheme_argument,
    why_not_fused,
)

__all__ = ["LINEARS", "OP", "EncoderParts", "forward"]

OP = "encoder_layer"
LINEARS = ("q", "k", "v", "o", "up", "down")
_KNOWN = (HARMLESS | {"attention_mask"}) - {"past_key_values"}


@dataclass(frozen=True)
class EncoderParts:
    """What a layer consists of.

    norms: attention_norm and output_norm of the op.  linears: in the order of `LINEARS`.

    positional: names of the arguments after the hidden states.
    """

    norms: tuple[NormPart, NormPart]
    linears: tuple[LinearPart, ...]
    positional: tuple[str, ...]
    heads: int = 0  # until a probe has found out
    sm_scale: float = 1.0
    activation: str = "gelu"


def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    reason = why_not_fused(self, hidden_states)
    if reason is None:
        try:
            return _whole(self, self._llmkern_layer, hidden_states, args, kwargs)
        except NotServed as unserved:
            reason = str(unserved)
    return run_parts(self, OP, reason, hidden_states, args, kwargs)


def _whole(self: Any, layer: EncoderParts, hidden: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
    if args:
        kwargs = {**dict(zip(layer.positional, args, strict=False)), **kwargs}
    if not _KNOWN.issuperset(kwargs):
        check_arguments((), kwargs, _KNOWN)
    check_guard(self)
    linears, schemes = linear_arguments(self, layer.linears, hidden)
    mask = kwargs.get("attention_mask")
    if mask is not None:
        mask = layer_mask(mask, hidden, hidden.shape[1])
    arguments: tuple[Any, ...] = (
        hidden,
        mask,
        *[norm_parameter(self, norm, name, hidden) for norm in layer.norms for name in (norm.weight, norm.bias)],
        *linears,
        layer.heads,
        eps_of(self, layer.norms),
        layer.sm_scale,
        layer.activation,
        scheme_argument(schemes, hidden),
    )
    return computed(ops.encoder_layer, _OPERATOR, arguments)


_OPERATOR = torch.ops.llmkern.encoder_layer.default
