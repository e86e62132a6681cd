"""Layers whose tensors a loader is about to fill, under the names that a checkpoint has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.nn._quantized_weight import with_hooks
from llmkern.nn.packed_embedding import PackedEmbedding
from llmkern.nn.packed_linear import PackedLinear
from llmkern.nn.quantized_linear import is_conv1d, weight_out_in
from llmkern.packed import PackedWeight

__all__ = ["Awaiting", "awaiting_embedding", "awaiting_linear", "group_size_of", "narrowest"]

Read = Callable[[dict[str, Tensor]], tuple[PackedWeight, Tensor | None]]
"""Takes a layer's tensors, gives the packed weight and the permutation of its columns."""


Sizes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shapes and dtypes by name."""


class Awaiting(nn.Module):
    """Stands for a layer until its tensors have values; `finish` makes the layer of them.

    path: of the layer, for errors.  tensors: shapes and dtypes that the checkpoint has, by name.
    """

    _is_hf_initialized = True  # transformers has nothing to initialise

    def __init__(
        self,
        path: str,
        tensors: Sizes,
        finish: Callable[[Awaiting], nn.Module],
    ) -> None:
        super().__init__()
        self.path, self._finish = path, finish
        for name, (shape, dtype) in tensors.items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self._parameters[name] = nn.Parameter(empty, requires_grad=False)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "weight" not in self._parameters:
            return torch.empty(0)  # for models that initialise a layer's weight from without
        return super().__getattr__(name)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return what has been loaded, by name."""
        return {name: tensor.detach() for name, tensor in self._parameters.items() if tensor is not None}

    @property
    def is_filled(self) -> bool:
        """Return True if there are values."""
        return not any(tensor.is_meta for tensor in self.tensors.values())

    def finish(self) -> nn.Module:
        """The layer.  Raises ValueError with its path where the tensors do not fit together."""
        try:
            return self._finish(self).train(self.training)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None


def awaiting_linear(
    path: str,
    module: nn.Module,
    tensors: Sizes,
    read: Read,
    *,
    kind: str | None = None,
    biased: bool = False,
) -> Awaiting:
    """The place of a linear layer that becomes a `PackedLinear` of what `read` makes of its tensors.

    biased: whether the checkpoint has a bias, which may be zeros where the layer has none.
    """
    weight, dtype = weight_out_in(module), module.weight.dtype
    size = tuple(weight.shape)
    has_bias = module.bias is not None

    def finish(filled: Awaiting) -> nn.Module:
        given = filled.tensors
        bias = given.pop("bias", None)
        packed, permutation = read(given)
        if (packed.n, packed.k) != size:
            raise ValueError(f"the weight is [{packed.n}, {packed.k}], expected {list(size)}")
        if not has_bias and bias is not None:
            if bool((bias != 0).any()):
                raise ValueError("it has a bias in the checkpoint, and none in the model")
            bias = None
        own = None if bias is None else nn.Parameter(bias, requires_grad=False)
        out = PackedLinear(packed, own, dtype, permutation=permutation, kind=kind)  # type: ignore[arg-type]
        out.from_conv1d = is_conv1d(module)
        return with_hooks(out, module)

    if has_bias or biased:
        tensors = {**tensors, "bias": (size[:1], dtype)}  # type: ignore[dict-item]
    return Awaiting(path, tensors, finish)


def awaiting_embedding(
    path: str,
    module: nn.Embedding,
    tensors: Sizes,
    read: Read,
    *,
    kind: str | None = None,
) -> Awaiting:
    """The place of an embedding that becomes a `PackedEmbedding` of what `read` makes of its tensors."""
    padding, dtype = module.padding_idx, module.weight.dtype

    def finish(filled: Awaiting) -> nn.Module:
        packed, _ = read(filled.tensors)
        return with_hooks(PackedEmbedding(packed, padding, dtype, kind=kind), module)

    return Awaiting(path, tensors, finish)


def narrowest(scale: Tensor) -> Tensor:
    """Scales, which loaders convert to the model's dtype, in 16 bits where those hold them exactly."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(scale.to(dtype).to(scale.dtype), scale):
            return scale.to(dtype)
    return scale


def group_size_of(path: str, columns: int, size: int) -> int:
    """Columns of a group, of which −1 means all.  Raises ValueError where groups do not divide the columns."""
    size = columns if size == -1 else size
    if size < 1 or columns % size:
        raise ValueError(
            f"{path} has {columns} columns, and groups of {size} in the checkpoint, which do not divide them"
        )
    return size
