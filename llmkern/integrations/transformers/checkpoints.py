"""Have transformers' own `from_pretrained` keep the codes of checkpoints that are quantized already.

Asked for by `quantization_config=llmkern.PackedConfig()`, or for a whole process by `LLMKERN_KEEP_PACKED=1`.  GPTQ and
AWQ checkpoints are kept too where the package is missing without which transformers would refuse them.  All else is
loaded as if llmkern were not there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from llmkern.config import settings

__all__ = ["register_once"]

_OURS = "_llmkern"  # marks functions that were put in place before


def register_once() -> None:
    """Put our functions before those by which transformers chooses a quantizer; they hand on what is not for us."""
    from transformers.quantizers import auto

    stock: Any = auto.AutoHfQuantizer.merge_quantization_configs
    if hasattr(stock, _OURS):
        return
    auto.AutoHfQuantizer.merge_quantization_configs = staticmethod(_merging(stock))  # type: ignore[method-assign]
    if "gguf" in auto.AUTO_QUANTIZER_MAPPING:  # from transformers 5.20 on
        auto.AUTO_QUANTIZER_MAPPING["gguf"] = _for_gguf(auto.AUTO_QUANTIZER_MAPPING["gguf"])


def _merging(stock: Callable[..., Any]) -> Callable[..., Any]:
    def merge(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        """Choose between a checkpoint's description and the argument, as transformers does, or take ours."""
        from llmkern.quantization.transformers_quantizer import PackedConfig

        described = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
        asked = isinstance(quantization_config_from_args, PackedConfig)
        if asked or (quantization_config_from_args is None and _keeps(described)):
            return PackedConfig(description=described)
        return stock(quantization_config, quantization_config_from_args)

    setattr(merge, _OURS, True)
    return merge


def _keeps(described: dict[str, Any]) -> bool:
    """Return whether a checkpoint of this description is kept packed though nobody passed a config."""
    from llmkern.quantization.checkpoint import readable

    needs_package = described.get("quant_method") in ("gptq", "awq") and importlib.util.find_spec("gptqmodel") is None
    if not (settings.keep_packed or needs_package):
        return False
    try:
        readable("from_pretrained", "the checkpoint", described, ())
    except ValueError:  # transformers may read it
        return False
    return True


def _for_gguf(stock: Any) -> Any:
    def quantizer(config: Any, **options: Any) -> Any:
        if settings.keep_packed and not config.dequantize:
            from llmkern.quantization.gguf_quantizer import PackedGgufQuantizer

            return PackedGgufQuantizer(config, **options)
        return stock(config, **options)

    return quantizer
