"""Linear layer with a weight packed in blocks: int4, int8 in blocks, GGUF's types, GPTQ and AWQ."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmkern import ops
from llmkern.nn._packed_module import PackedModule
from llmkern.nn.quantized_linear import LinearOfConv1D, QuantizedLinear, weight_out_in
from llmkern.packed import PackedWeight

__all__ = ["PackedLinear"]


class PackedLinear(PackedModule, QuantizedLinear):  # type: ignore[override]
    """`nn.Linear` over a `PackedWeight` [out, in]: 4 to 8 bits for each weight, with scales in blocks.

    The forward is `llmkern.ops.quantized_linear`, which rounds each 32 neighbours of the input to int8 (scheme "a8").
    Codes, scales and permutation are those of `PackedModule`; weight and bias as `QuantizedLinear` has them.
    Loading a state dict of another code, dtype or shape, or with scales that are NaN or infinite, is an error that
    leaves the module as it was.  Gradients reach the input and the bias.

    packed: the weight; its tensors are held as they are.  bias: [out].  dtype: of the weight as others read it, and of
    the layer that `to_linear` gives back.  permutation: [in], `PackedModule`'s.  kind: the name for reports.
    """

    def __init__(
        self,
        packed: PackedWeight,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype | None = None,
        *,
        permutation: Tensor | None = None,
        kind: str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a floating-point weight
        self.in_features, self.out_features = packed.k, packed.n
        self._hold_packed(packed, torch.get_default_dtype() if dtype is None else dtype, permutation, kind)
        self.register_parameter("bias", bias)
        self.from_conv1d = False

    @classmethod
    def from_linear(cls, module: nn.Module, packed: PackedWeight) -> PackedLinear:
        """Make the layer with the packed weight in place of an nn.Linear or transformers' Conv1D, which is not changed.

        The bias, hooks and training flag are the given module's own.  Raises TypeError for other modules, ValueError
        for a packed weight of another size.
        """
        weight = weight_out_in(module, "PackedLinear")
        if weight.shape != (packed.n, packed.k):
            raise ValueError(
                f"PackedLinear: packed is [{packed.n}, {packed.k}], expected {list(weight.shape)}, the weight's size"
            )
        out = cls(packed, dtype=weight.dtype)
        out._take_place_of(module)
        return out

    def forward(self, input: Tensor) -> Tensor:
        held = self._buffers
        permutation = held["permutation"]
        if permutation is not None:
            input = input.index_select(-1, permutation)
        return ops.quantized_linear(
            input,
            self.codes,
            held["weight_scale"],  # type: ignore[arg-type]
            held["weight_zero"],
            held["weight_offset"],
            held["weight_super_scale"],
            held["weight_super_offset"],
            self.bias,
            code=self.code,
            n=self._rows,
        )

    def _floating_class(self) -> type[nn.Module]:
        return LinearOfConv1D if self.from_conv1d else nn.Linear

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}, dtype={self.dtype}"
