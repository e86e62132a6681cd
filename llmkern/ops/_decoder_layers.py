"""Decoder layers one after the other in one call of the native library.

At batch 1 a layer takes less time than the Python around it.  `torch.ops.llmkern.decoder_layers_` is `decoder_layer_`
for each of a model's layers, with the same bits; on the CPU the threads are called together once for all of them.
Nothing is checked but what the kernels would read: the caller is the swap (llmkern/swap/decoder_stack.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern.library import compose
from llmkern.ops import decoder_layer_  # noqa: F401  # defines the op

__all__ = ["CACHES", "PARAMETERS"]

_LAYER = torch.ops.llmkern.decoder_layer_.default
_NAMES = [argument.name for argument in _LAYER._schema.arguments]

CACHES = tuple(_NAMES[_NAMES.index("k_cache") : _NAMES.index("past")])
"""The arguments of `decoder_layer_` that make up `caches`; the scales only where there are any."""

PARAMETERS = tuple(_NAMES[_NAMES.index("input_norm") : _NAMES.index("head_dim")])
"""The arguments of `decoder_layer_` that make up `parameters`, for one layer."""


def _one_by_one(
    hidden: Tensor, caches: Sequence[Tensor], parameters: Sequence[Tensor | None], scheme: str, **same: Any
) -> Tensor:
    count = len(parameters) // len(PARAMETERS)
    held, schemes = len(caches) // count, scheme.split(";")
    for i in range(count):
        own = dict.fromkeys(CACHES) | dict(zip(CACHES, caches[i * held : (i + 1) * held], strict=False))
        own |= dict(zip(PARAMETERS, parameters[i * len(PARAMETERS) : (i + 1) * len(PARAMETERS)], strict=True))
        hidden = _LAYER(hidden=hidden, **same, **own, scheme=schemes[i if len(schemes) > 1 else 0])
    return hidden


def _fake(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden.new_empty(hidden.shape)


# caches: none, or for each layer its keys and values, or these and their scales.  parameters: those of one layer after
# the other.  scheme: that of a layer, for all of them, or one for each, with semicolons.
compose(
    "decoder_layers_(Tensor hidden, Tensor cos, Tensor sin, Tensor(a!)[] caches, int past, Tensor? mask,"
    " Tensor?[] parameters, int head_dim, float eps, float norm_offset, bool interleaved, float sm_scale, int window,"
    " float softcap, str activation, str scheme) -> Tensor",
    _one_by_one,
    fake=_fake,
)
