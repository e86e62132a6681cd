"""Quantizer for transformers; importing this module registers it.

`from_pretrained(..., quantization_config=llmkern.QuantConfig("int4"))` quantizes while loading, and
`llmkern.PackedConfig()` keeps the codes of a checkpoint that is quantized already (`integrations/transformers/
checkpoints.py` leads there).  A quantized checkpoint calls itself compressed-tensors, so that everybody reads it;
`llmkern.load` has it read by this quantizer instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers import HfQuantizer, auto, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmkern.quantization.checkpoint import (
    OURS,
    describe_in_config,
    packed_layers,
    readable,
    refuse_wrong_values,
    tensor_names,
)
from llmkern.quantization.formats import format_of_group
from llmkern.quantization.formats._awaiting import Awaiting
from llmkern.quantization.layers import places_of, put
from llmkern.quantization.methods import give_methods
from llmkern.quantization.quantize import quantize_
from llmkern.quantization.schemes import Int8, Scheme, scheme_from_dict, scheme_named, scheme_to_dict

__all__ = ["Int8Config", "PackedConfig", "QuantConfig", "Quantizer", "finish_loading"]

METHOD = "llmkern"


@register_quantization_config(METHOD)
class QuantConfig(QuantizationConfigMixin):
    """Have `from_pretrained` quantize the model that it loads, as `quantize_(model, scheme, skip=skip)` does.

    scheme, skip: as of `llmkern.quantize_`; a scheme may also be what `scheme_to_dict` makes of it.
    description: of a checkpoint that is quantized already, by `llmkern.load`.
    """

    def __init__(
        self,
        scheme: Any = "int8",
        skip: Sequence[str] = (),
        description: dict[str, Any] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers' own are an enum
        is_written = isinstance(scheme, dict) and bool({"scheme", "layers"} & scheme.keys())
        asked = scheme_from_dict(scheme) if is_written else scheme_named(scheme, type(self).__name__)
        self.scheme = scheme_to_dict(asked)
        self.skip = list(skip)
        self.description = description

    @property
    def asked(self) -> Scheme:
        """Scheme that is passed to `quantize_`."""
        return scheme_from_dict(self.scheme)


class Int8Config(QuantConfig):
    """`QuantConfig` of `Int8(max_error, smooth)`."""

    def __init__(self, max_error: float = Int8.max_error, smooth: bool = Int8.smooth, skip: Sequence[str] = ()) -> None:
        super().__init__(Int8(max_error, smooth), skip)


class PackedConfig(QuantConfig):
    """Have `from_pretrained` keep the codes of a checkpoint that is quantized already, for llmkern's kernels.

    That is a GGUF file (`gguf_file=`), GPTQ, AWQ, or compressed-tensors with int8 weights per channel or packed
    weights of 4 to 8 bits.  Others, and checkpoints in floating point, are a ValueError.
    description: of the checkpoint; transformers passes it on.
    """

    def __init__(self, description: dict[str, Any] | None = None) -> None:
        super().__init__(description=description)


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):
    """Puts quantized modules where the checkpoint has quantized layers, or quantizes what was loaded.

    It takes itself away afterwards: a model that was loaded is the same as one that `quantize_` made.
    """

    quantization_config: QuantConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        if config.description is None:
            return
        files = kwargs.get("checkpoint_files") or ()
        if isinstance(config, PackedConfig):
            place = Path(files[0]).parent if files else "the checkpoint"
            config.description = readable("from_pretrained", place, config.description, files)
        places = places_of(model)
        for path, module, group in list(packed_layers(model, config.description)):
            put(places[module], format_of_group(group).empty(path, module, group))
        if isinstance(config, PackedConfig) and files:
            _refuse_missing(model, files)
        ignored = [*(getattr(model, "_keys_to_ignore_on_load_missing", None) or ()), *(rf"\.{name}$" for name in OURS)]
        model._keys_to_ignore_on_load_missing = ignored  # type: ignore[assignment]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config, description = self.quantization_config, self.quantization_config.description
        finish_loading(self, model)
        if description is None:
            quantize_(model, config.asked, skip=config.skip)
            return
        if isinstance(config, PackedConfig):
            refuse_wrong_values("from_pretrained", model)
        model.config.quantization_config = description  # type: ignore[union-attr]
        describe_in_config(model)

    def is_serializable(self) -> bool:
        """Allow save_pretrained."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Allow training adapters on the model."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Allow torch.compile."""
        return True


def _quantizer(config: QuantConfig, **options: Any) -> HfQuantizer:
    """Return the quantizer for our configs: GGUF's where a checkpoint has no description, as its files have none."""
    if isinstance(config, PackedConfig) and config.description is None:
        from transformers.utils.quantization_config import GgufConfig

        from llmkern.quantization.gguf_quantizer import PackedGgufQuantizer

        return PackedGgufQuantizer(GgufConfig(), **options)
    return Quantizer(config, **options)


auto.AUTO_QUANTIZER_MAPPING[METHOD] = _quantizer  # type: ignore[assignment]


def _refuse_missing(model: nn.Module, files: Sequence[str]) -> None:
    """Raise ValueError for a tensor that the checkpoint lacks: transformers would only warn, and leave it at random.

    Names are compared by their ends, since checkpoints and models may differ in what they begin with.
    """
    known = {_end_of(name) for name in (*tensor_names(files), *(getattr(model, "all_tied_weights_keys", None) or ()))}
    for path, module in model.named_modules():
        if isinstance(module, Awaiting):
            for name in module.tensors:
                if _end_of(f"{path}.{name}") not in known:
                    raise ValueError(f"from_pretrained: {Path(files[0]).parent} lacks {path}.{name}")


def _end_of(name: str) -> str:
    return ".".join(name.split(".")[-5:])


def finish_loading(quantizer: HfQuantizer, model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Put the layers in place that have waited for their tensors, and take the quantizer away.

    Returns the layers by what stood for them.  Where a checkpoint is only looked at, on the meta device, they wait on.
    """
    quantizer.remove_quantization_config(model)
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_is_quantized"):
            del module.config._is_quantized  # type: ignore[union-attr]
    places = places_of(model)
    made: dict[nn.Module, nn.Module] = {}
    for module in [each for each in model.modules() if isinstance(each, Awaiting) and each.is_filled]:
        made[module] = module.finish()
        put(places[module], made[module])
    first: dict[Any, Any] = {}
    for module, layer in made.items():
        codes = module._parameters.get("weight")
        if codes is not None and (other := first.setdefault(codes, layer)) is not layer:
            layer._tie_to(other)  # type: ignore[operator]  # as transformers has tied them
    give_methods(model)
    return made
