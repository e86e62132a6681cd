"""llmkern as one of transformers' quantizers; importing this registers it.

`from_pretrained(..., quantization_config=llmkern.Int8Config())` quantizes while loading.  A quantized checkpoint calls
itself compressed-tensors, so that everybody reads it; `llmkern.load` has it read by this quantizer instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmkern.quantization.checkpoint import OURS, describe_in_config, packed_layers
from llmkern.quantization.formats import format_of_group
from llmkern.quantization.layers import places_of, put
from llmkern.quantization.methods import give_methods
from llmkern.quantization.quantize import quantize_
from llmkern.quantization.schemes import Int8, scheme_from_dict

__all__ = ["Int8Config", "Int8Quantizer"]

METHOD = "llmkern"


@register_quantization_config(METHOD)
class Int8Config(QuantizationConfigMixin):
    """Have `from_pretrained` quantize the model that it loads, as `quantize_(model, Int8(…), skip=skip)` does.

    max_error, smooth: as of `llmkern.Int8`.  skip: as of `llmkern.quantize_`.
    description: of a checkpoint that is int8 already, by `llmkern.load`.
    """

    def __init__(
        self,
        max_error: float = Int8.max_error,
        smooth: bool = Int8.smooth,
        skip: Sequence[str] = (),
        description: dict[str, Any] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        Int8(max_error, smooth)  # raises where they are not accepted
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers' own are an enum
        self.max_error, self.smooth, self.skip = max_error, smooth, list(skip)
        self.description = description

    @property
    def scheme(self) -> Int8:
        """The scheme that `quantize_` is asked for."""
        return scheme_from_dict({"max_error": self.max_error, "smooth": self.smooth})


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):
    """Puts int8 modules where the checkpoint has int8 layers, or quantizes what was loaded.

    It takes itself away afterwards: a model that was loaded is the same as one that `quantize_` made.
    """

    quantization_config: Int8Config

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        description = self.quantization_config.description
        if description is None:
            return
        places = places_of(model)
        for path, module, group in list(packed_layers(model, description)):
            put(places[module], format_of_group(group).empty(path, module, group))
        ignored = [*(getattr(model, "_keys_to_ignore_on_load_missing", None) or ()), *(rf"\.{name}$" for name in OURS)]
        model._keys_to_ignore_on_load_missing = ignored  # type: ignore[assignment]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config, description = self.quantization_config, self.quantization_config.description
        self.remove_quantization_config(model)
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_is_quantized"):
                del module.config._is_quantized  # type: ignore[union-attr]
        if description is None:
            quantize_(model, config.scheme, skip=config.skip)
            return
        model.config.quantization_config = description  # type: ignore[union-attr]
        describe_in_config(model)
        give_methods(model)

    def is_serializable(self) -> bool:
        """Whether save_pretrained may be called."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters may be trained on it."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether torch.compile takes it."""
        return True
