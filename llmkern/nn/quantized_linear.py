"""Shared base of linear layers with quantized weights, whatever their format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmkern.nn._quantized_weight import QuantizedWeight, with_hooks

__all__ = ["LinearOfConv1D", "QuantizedLinear", "conv1d_of", "is_conv1d", "weight_out_in"]


class QuantizedLinear(QuantizedWeight, nn.Linear):  # type: ignore[override]
    """`nn.Linear` whose weight is stored in few bits: `Int8Linear`, or `PackedLinear` for every other format.

    weight: the floating-point weight, [out, in], for everybody who reads an nn.Linear's: computed when its values are
        read.  What writes to it (merging an adapter, for one) or trains it turns the module into an nn.Linear with
        exactly what was written.
    bias: as in nn.Linear.  `.to(dtype)`, `.half()` and so on convert the bias, never codes or scales.
    from_conv1d: whether it stands for transformers' Conv1D, whose weight is [in, out].
    """

    bias: nn.Parameter | None  # type: ignore[assignment]

    def _take_place_of(self, module: nn.Module) -> None:
        """Take over the bias, hooks and training flag of the floating-point layer that this one replaces."""
        self.bias = module.bias  # type: ignore[assignment]
        self.from_conv1d = is_conv1d(module) or isinstance(module, LinearOfConv1D)
        with_hooks(self, module)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return a floating-point nn.Linear with the dequantized weight; it shares the bias if dtypes agree.

        dtype: of its parameters (default: this layer's).  Quantization has rounded the weight: it is not the original.
        """
        dtype = self.dtype if dtype is None else dtype
        with torch.device("meta"):
            out = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        out.weight = nn.Parameter(self.dequantized_weight(dtype))
        if self.bias is not None:
            out.bias = self.bias if self.bias.dtype == dtype else nn.Parameter(self.bias.detach().to(dtype))
        return with_hooks(out, self)

    def reset_parameters(self) -> None:
        name = type(self).__name__
        raise RuntimeError(
            f"{'an' if name[0] in 'AEIO' else 'a'} {name} has no random initialisation: use from_linear or load a "
            "state dict"
        )


class LinearOfConv1D(nn.Linear):
    """Floating-point layer that replaces a quantized Conv1D whose weight was written; its state dict is a Conv1D's.

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
    """Make a transformers Conv1D with the weight, bias, hooks and training flag of `linear`."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        out = Conv1D(linear.out_features, linear.in_features)
    out.weight = nn.Parameter(linear.weight.detach().T.contiguous())
    out.bias = linear.bias
    return with_hooks(out, linear)


def is_conv1d(module: nn.Module) -> bool:
    """Recognize transformers' Conv1D, a linear layer whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(module.weight, Tensor)


def weight_out_in(module: nn.Module, what: str = "Int8Linear") -> Tensor:
    """Return the weight as [out, in]; raises TypeError, naming `what`, if the module is not a floating-point linear
    layer.
    """
    if isinstance(module, QuantizedWeight):
        raise TypeError(f"{what}: module is an {type(module).__name__}: the layer is quantized already")
    if is_conv1d(module):
        return module.weight.T  # type: ignore[return-value]
    if isinstance(module, nn.Linear):
        return module.weight
    raise TypeError(f"{what}: module is a {type(module).__name__}, expected nn.Linear or transformers' Conv1D")
