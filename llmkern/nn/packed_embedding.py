"""Embedding with a weight packed in blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmkern.nn._packed_module import PackedModule
from llmkern.nn._quantized_weight import with_hooks
from llmkern.nn.quantized_embedding import QuantizedEmbedding
from llmkern.packed import PackedWeight

__all__ = ["PackedEmbedding"]


class PackedEmbedding(PackedModule, QuantizedEmbedding):  # type: ignore[override]
    """`nn.Embedding` over a `PackedWeight` [num_embeddings, embedding_dim]; rows are unpacked as they are looked up.

    packed: the weight; its tensors are held as they are.  dtype: of what it returns, computed in fp32.
    kind: the name for reports.
    """

    def __init__(
        self,
        packed: PackedWeight,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        *,
        kind: str | None = None,
    ) -> None:
        self._shape(packed.n, packed.k, padding_idx)
        self._hold_packed(packed, torch.get_default_dtype() if dtype is None else dtype, None, kind)

    @classmethod
    def from_embedding(cls, module: nn.Embedding, packed: PackedWeight) -> PackedEmbedding:
        """Make the embedding with the packed weight in place of `module`, which is not changed.

        Raises TypeError for other modules, ValueError for max_norm, which writes to the weight.
        """
        cls._check(module)
        return with_hooks(cls(packed, module.padding_idx, module.weight.dtype), module)

    @classmethod
    def tied(cls, module: nn.Embedding, head: PackedModule) -> PackedEmbedding:
        """Make the packed form of an embedding tied to `head`: both hold the same codes, one Parameter."""
        groups = {name: tensor.clone() for name, tensor in head.packed.tensors.items() if name != "codes"}
        packed = PackedWeight(head.code, head.packed.n, head.codes, **groups)
        return with_hooks(cls(packed, module.padding_idx, module.weight.dtype, kind=head.kind), module)

    def forward(self, input: Tensor) -> Tensor:
        # PyTorch's own refuses them too; the last panel has rows that are not the weight's.
        if not torch.compiler.is_compiling() and input.device.type == "cpu" and input.numel():
            low, high = torch.aminmax(input)
            if int(low) < 0 or int(high) >= self.num_embeddings:
                raise IndexError("index out of range in self")
        return self.packed.take(input).to(self.dtype)

    def _floating_class(self) -> type[nn.Module]:
        return nn.Embedding

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"
