"""Save a quantized model with `save_pretrained`; before it returns, the checkpoint is read back without values."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from llmkern.quantization.checkpoint import describe_in_config, load
from llmkern.quantization.formats import format_of_module
from llmkern.swap.derive import original_class

__all__ = ["save_pretrained"]


def save_pretrained(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """Like transformers' `save_pretrained`; raises ValueError for a layer without a form in a checkpoint, and
    RuntimeError if the checkpoint cannot be read back into a model of this class.

    Tensors are called what they are called in the original checkpoints of the architecture.  Where those hold other
    tensors than the model, as of experts one by one, the model's own names are written instead: transformers' reader of
    compressed-tensors checkpoints drops floating-point tensors that it would have to merge.

    Warns of GPT-2's Conv1D: compressed-tensors knows nn.Linear only, and transformers without llmkern leaves such a
    layer's weight at random.
    """
    describe_in_config(
        model, to_save=True
    )  # layers may have become floating point since, as merging an adapter makes them
    if _merges(model):
        kwargs.setdefault("save_original_format", False)
    cls = original_class(model)
    whole = not getattr(model, "_hf_peft_config_loaded", False) and kwargs.get("state_dict") is None
    if whole and len(args) < 2:  # the second is state_dict
        kwargs["state_dict"] = _written(model)
    result = cls.save_pretrained(model, save_directory, *args, **kwargs)
    if not hasattr(model.config, "quantization_config"):
        return result
    turned = [path for path, module in model.named_modules() if getattr(module, "from_conv1d", False)]
    if turned:
        warnings.warn(
            f"save_pretrained: only llmkern.load reads this checkpoint: {turned[0]} and {len(turned) - 1} others are "
            "Conv1D layers, which transformers without llmkern, and vLLM, do not unpack",
            stacklevel=2,
        )
    if whole and kwargs.get("is_main_process", True) and not kwargs.get("distributed_checkpoint", False):
        try:
            load(save_directory, model_class=cls, device_map={"": "meta"}, variant=kwargs.get("variant"))
        except Exception as error:
            why = str(error).removeprefix("load: ").splitlines()[0]
            raise RuntimeError(
                f"save_pretrained: the checkpoint was written, but cannot be read back ({why}); "
                "llmkern.dequantize_(model) can be saved"
            ) from error
    return result


def _written(model: Any) -> dict[str, Any]:
    """Convert the state to the checkpoint's formats."""
    state = dict(model.state_dict())
    shared: dict[Tensor, Tensor] = {}  # tied codes are written once
    for path, module in model.named_modules():
        form = format_of_module(module)
        if form is not None and form.write is not None:
            for name in [name for name in state if name.rpartition(".")[0] == path and name != f"{path}.bias"]:
                del state[name]
            written = form.write(module)
            if "weight" in written:
                written["weight"] = shared.setdefault(module.codes, written["weight"])
            state |= {f"{path}.{name}": tensor for name, tensor in written.items()}
    return state


def _merges(model: Any) -> bool:
    """Return True if loading this model merges or splits tensors of the original checkpoints."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # transformers 4 merges nothing
        return False
    return any(isinstance(each, WeightConverter) for each in get_model_conversion_mapping(model, add_legacy=False))
