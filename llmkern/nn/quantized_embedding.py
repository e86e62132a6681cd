"""Shared base of embeddings with quantized weights, whatever their format."""

from __future__ import annotations

import torch
from torch import nn

from llmkern.nn._quantized_weight import QuantizedWeight, with_hooks

__all__ = ["QuantizedEmbedding"]


class QuantizedEmbedding(QuantizedWeight, nn.Embedding):  # type: ignore[override]
    """`nn.Embedding` whose rows are stored in few bits: `Int8Embedding` or `PackedEmbedding`.

    weight: the floating-point weight, as `QuantizedLinear`'s.  An output head tied to it holds the same codes.
    dtype: of what it returns; `.to(dtype)` changes it, never codes or scales.
    """

    def _shape(self, rows: int, columns: int, padding_idx: int | None) -> None:
        nn.Module.__init__(self)  # nn.Embedding's own would allocate a floating-point weight
        self.num_embeddings, self.embedding_dim, self.padding_idx = rows, columns, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False

    @classmethod
    def _check(cls, module: nn.Module) -> None:
        """Raise if `module` is not an embedding that can be quantized."""
        name = cls.__name__
        if not isinstance(module, nn.Embedding):
            raise TypeError(f"{name}: module is a {type(module).__name__}, expected nn.Embedding")
        if isinstance(module, QuantizedWeight):
            raise TypeError(f"{name}: module is an {type(module).__name__}: it is quantized already")
        if module.max_norm is not None:
            raise ValueError(f"{name}: max_norm is {module.max_norm}, which writes to the weight; expected None")

    def to_embedding(self, dtype: torch.dtype | None = None, weight: nn.Parameter | None = None) -> nn.Embedding:
        """Return a floating-point nn.Embedding with the dequantized weight, or with `weight` (tied to a head)."""
        with torch.device("meta"):
            out = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx)
        out.weight = nn.Parameter(self.dequantized_weight(dtype)) if weight is None else weight
        return with_hooks(out, self)

    def reset_parameters(self) -> None:
        name = type(self).__name__
        raise RuntimeError(
            f"{'an' if name[0] in 'AEIO' else 'a'} {name} has no random initialisation: use from_embedding or load a "
            "state dict"
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dtype={self.dtype}"
