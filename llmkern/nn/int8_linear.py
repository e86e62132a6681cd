"""Linear layer with an int8 weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmkern import ops
from llmkern.checks import FLOATING, check_choice
from llmkern.nn._int8_weight import Int8Weight, quantized
from llmkern.nn.quantized_linear import LinearOfConv1D, QuantizedLinear, weight_out_in
from llmkern.ops.int8_linear import SCHEMES

__all__ = ["Int8Linear"]


class Int8Linear(Int8Weight, QuantizedLinear):  # type: ignore[override]
    """`nn.Linear` with an int8 weight and one fp32 scale per output channel; a quarter of fp32's bytes.

    codes: [out, in] int8, frozen.  weight_scale: buffer [out, 1] fp32.  State dicts call them `weight` and
    `weight_scale`, as the compressed-tensors checkpoint format does.  weight, bias: as `QuantizedLinear` has them.
    scheme: "auto", "w8a8" or "w8a16", as in `llmkern.ops.int8_linear`, which computes the forward.  It travels in
    the state dict as the extra state; a state dict without one leaves it as it is.
    dtype: of the bias, and of the layer that `to_linear` gives back.

    A module made by the constructor computes 0; use `from_linear` or load a state dict.  Loading codes or scales of
    another dtype or shape, and scales that are NaN, infinite or negative, is an error that leaves the module as it
    was.  Gradients reach the input and the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scheme: str = "auto",
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a floating-point weight
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in FLOATING:
            raise TypeError(f"Int8Linear: dtype is {dtype}, expected float32, bfloat16, float16 or float64")
        self.in_features, self.out_features = in_features, out_features
        self.scheme = scheme
        self._hold_zeros(out_features, in_features, dtype, device)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device))
        else:
            self.register_parameter("bias", None)
        self.from_conv1d = False

    @property
    def scheme(self) -> str:
        return self._scheme

    @scheme.setter
    def scheme(self, scheme: str) -> None:
        check_choice("Int8Linear", "scheme", scheme, SCHEMES)
        self._scheme = scheme

    @classmethod
    def from_linear(cls, module: nn.Module, *, scheme: str = "auto") -> Int8Linear:
        """Make the int8 layer of an nn.Linear, or of transformers' Conv1D (GPT-2), whose weight is [in, out].

        The bias, device, hooks and training flag are the given module's own; it is not changed.
        Raises TypeError for other modules and dtypes, ValueError for meta tensors and weights that are not finite.
        """
        weight = weight_out_in(module).detach()
        codes, scale = quantized("Int8Linear", weight)
        out = cls(weight.shape[1], weight.shape[0], False, device="meta", dtype=weight.dtype, scheme=scheme)
        out.hold(nn.Parameter(codes, requires_grad=False), scale)
        out._take_place_of(module)
        return out

    def forward(self, input: Tensor) -> Tensor:
        return ops.int8_linear(input, self.codes, self.weight_scale, self.bias, scheme=self._scheme)

    def _floating_class(self) -> type[nn.Module]:
        return LinearOfConv1D if self.from_conv1d else nn.Linear

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme}, dtype={self.dtype}"

    def get_extra_state(self) -> Tensor:
        # A tensor, because safetensors stores nothing else.
        return torch.tensor(SCHEMES.index(self.scheme), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        self.scheme = SCHEMES[int(state)]

    def _wrong_state(self, prefix: str, state_dict: dict[str, Any]) -> list[str]:
        wrong = super()._wrong_state(prefix, state_dict)
        return [*wrong, *_wrong_scheme(f"{prefix}_extra_state", state_dict)]


def _wrong_scheme(key: str, state_dict: dict[str, Any]) -> list[str]:
    state = state_dict.get(key)
    if state is None or (isinstance(state, Tensor) and state.numel() == 1 and 0 <= int(state) < len(SCHEMES)):
        return []
    return [f"{key} is {state!r}, expected a tensor from 0 to {len(SCHEMES) - 1}: {', '.join(SCHEMES)}"]
