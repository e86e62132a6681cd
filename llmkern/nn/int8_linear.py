"""A linear layer whose weight is int8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmkern import ops
from llmkern.checks import FLOATING, check_choice
from llmkern.nn._int8_weight import Int8Weight, quantized, with_hooks
from llmkern.ops.int8_linear import SCHEMES

__all__ = ["Int8Linear", "LinearOfConv1D", "conv1d_of", "is_conv1d", "weight_out_in"]


class Int8Linear(Int8Weight, nn.Linear):  # type: ignore[override]
    """`nn.Linear` with an int8 weight and one fp32 scale per output channel; a quarter of fp32's bytes.

    codes: [out, in] int8, frozen.  weight_scale: buffer [out, 1] fp32.  bias: as in nn.Linear.  State dicts call them
    `weight`, `weight_scale` and `bias`, as the compressed-tensors checkpoint format does.  `.to(dtype)`, `.half()` and
    so on convert the bias, never the codes or the scales.
    weight: the floating-point weight, [out, in], for everybody who reads an nn.Linear's: codes times scales, computed
        when its values are read.  What writes to it (merging an adapter, for one) or trains it turns the module into
        an nn.Linear with exactly what was written.
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
        self._hold_codes(out_features, in_features, dtype, device)
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
        """The int8 layer of an nn.Linear, or of transformers' Conv1D (GPT-2), whose weight is [in, out].

        The bias, device, hooks and training flag are the given module's own; it is not changed.
        Raises TypeError for other modules and dtypes, ValueError for meta tensors and weights that are not finite.
        """
        if isinstance(module, Int8Weight):
            raise TypeError(f"Int8Linear: module is an {type(module).__name__}: the layer is quantized already")
        weight = weight_out_in(module).detach()
        codes, scale = quantized("Int8Linear", weight)
        out = cls(weight.shape[1], weight.shape[0], False, device="meta", dtype=weight.dtype, scheme=scheme)
        out.hold(nn.Parameter(codes, requires_grad=False), scale)
        out.bias = module.bias  # type: ignore[assignment]
        out.from_conv1d = is_conv1d(module) or isinstance(module, LinearOfConv1D)
        return with_hooks(out, module)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A floating-point nn.Linear with the weight that the codes stand for; it shares the bias where dtypes agree.

        dtype: of its parameters (default: this layer's).  Quantization has rounded the weight: it is not the original.
        """
        dtype = self.dtype if dtype is None else dtype
        with torch.device("meta"):
            out = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        out.weight = nn.Parameter(self.dequantized_weight(dtype))
        if self.bias is not None:
            out.bias = self.bias if self.bias.dtype == dtype else nn.Parameter(self.bias.detach().to(dtype))
        return with_hooks(out, self)

    def forward(self, input: Tensor) -> Tensor:
        return ops.int8_linear(input, self.codes, self.weight_scale, self.bias, scheme=self._scheme)

    def _floating_class(self) -> type[nn.Module]:
        return LinearOfConv1D if self.from_conv1d else nn.Linear

    def reset_parameters(self) -> None:
        raise RuntimeError("an Int8Linear has no random initialisation: use from_linear or load a state dict")

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


class LinearOfConv1D(nn.Linear):
    """The floating-point layer in place of an int8 Conv1D whose weight was written: its state dict is a Conv1D's.

    `llmkern.dequantize_` puts a Conv1D in its place.
    """

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].T.contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        key = f"{prefix}weight"
        if key in state_dict:
            state_dict = {**state_dict, key: state_dict[key].T.contiguous()}
        super()._load_from_state_dict(state_dict, prefix, *others)


def conv1d_of(linear: nn.Linear) -> nn.Module:
    """transformers' Conv1D with the weight, bias, hooks and training flag of `linear`."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        out = Conv1D(linear.out_features, linear.in_features)
    out.weight = nn.Parameter(linear.weight.detach().T.contiguous())
    out.bias = linear.bias
    return with_hooks(out, linear)


def is_conv1d(module: nn.Module) -> bool:
    """Is it transformers' Conv1D: a linear layer with its weight as [in, out]?"""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(module.weight, Tensor)


def weight_out_in(module: nn.Module) -> Tensor:
    """The weight as [out, in]; TypeError for what is no linear layer."""
    if is_conv1d(module):
        return module.weight.T  # type: ignore[return-value]
    if isinstance(module, nn.Linear):
        return module.weight
    raise TypeError(f"Int8Linear: module is a {type(module).__name__}, expected nn.Linear or transformers' Conv1D")


def _wrong_scheme(key: str, state_dict: dict[str, Any]) -> list[str]:
    state = state_dict.get(key)
    if state is None or (isinstance(state, Tensor) and state.numel() == 1 and 0 <= int(state) < len(SCHEMES)):
        return []
    return [f"{key} is {state!r}, expected a tensor from 0 to {len(SCHEMES) - 1}: {', '.join(SCHEMES)}"]
