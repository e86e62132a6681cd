"""Base of the configs by which our quantization methods present themselves to vLLM."""

from __future__ import annotations

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from llmkern.checks import FLOATING

__all__ = ["AnyDeviceConfig"]


class AnyDeviceConfig(QuantizationConfig):
    """Config of a method for every floating dtype and device, described by the model's config.json alone."""

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(FLOATING)

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []
