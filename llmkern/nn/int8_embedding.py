"""Embedding with an int8 weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkern.checks import FLOATING
from llmkern.nn._int8_weight import Int8Weight, quantized
from llmkern.nn._quantized_weight import with_hooks
from llmkern.nn.quantized_embedding import QuantizedEmbedding

__all__ = ["Int8Embedding"]


class Int8Embedding(Int8Weight, QuantizedEmbedding):  # type: ignore[override]
    """`nn.Embedding` with int8 rows and one fp32 scale for each; a quarter of fp32's bytes.

    codes: [num_embeddings, embedding_dim] int8, frozen.  weight_scale: buffer [num_embeddings, 1] fp32.
    weight: their product, as Int8Linear's.  An output head tied to it is an `Int8Linear` with the same codes (`tied`).
    dtype: of what it returns, codes times scale computed in fp32.  `.to(dtype)` changes it, never codes or scales.

    A module made by the constructor gives 0; use `from_embedding` or load a state dict, which is checked as
    Int8Linear's is.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._shape(num_embeddings, embedding_dim, padding_idx)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in FLOATING:
            raise TypeError(f"Int8Embedding: dtype is {dtype}, expected float32, bfloat16, float16 or float64")
        self._hold_zeros(num_embeddings, embedding_dim, dtype, device)

    @classmethod
    def from_embedding(cls, module: nn.Embedding) -> Int8Embedding:
        """Make the int8 form of an nn.Embedding, with its device, hooks and training flag; the original is not changed.

        Raises TypeError for other modules and dtypes, ValueError for max_norm (which writes to the weight), meta
        tensors and values that are not finite.
        """
        cls._check(module)
        codes, scale = quantized("Int8Embedding", module.weight.detach())
        return cls._like(module, nn.Parameter(codes, requires_grad=False), scale)

    @classmethod
    def tied(cls, module: nn.Embedding, head: Int8Weight) -> Int8Embedding:
        """Make the int8 form of an embedding tied to `head`: both hold the same codes, one Parameter.

        The scales are copied: transformers would save shared ones under one of their names only.
        """
        return cls._like(module, head.codes, head.weight_scale.clone())

    @classmethod
    def _like(cls, module: nn.Embedding, codes: Tensor, scale: Tensor) -> Int8Embedding:
        rows, columns = codes.shape
        out = cls(rows, columns, module.padding_idx, device="meta", dtype=module.weight.dtype)
        out.hold(codes, scale)
        return with_hooks(out, module)

    def forward(self, input: Tensor) -> Tensor:
        return (F.embedding(input, self.codes) * F.embedding(input, self.weight_scale)).to(self.dtype)

    def _floating_class(self) -> type[nn.Module]:
        return nn.Embedding
