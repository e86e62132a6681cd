"""int8 models on disk, in the compressed-tensors format that transformers and vLLM read.

`quantize_` writes the format's description into the model's transformers config, so that `save_pretrained` gives a
complete checkpoint: `X.weight` int8 [out, in], `X.weight_scale` fp32 [out, 1].  Stock transformers loads it and
dequantizes; `load_` keeps the codes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llmkern.nn import Int8Embedding, Int8Linear
from llmkern.nn.int8_linear import is_conv1d, weight_out_in
from llmkern.quantization.layers import find_layers, places_of, replace
from llmkern.quantization.undo import undoing
from llmkern.quantization.vocabulary import mind_vocabulary
from llmkern.swap.derive import original_class

__all__ = ["describe_in_config", "forget_in_config", "load_"]

_SCHEME = "_extra_state"  # an Int8Linear's, in its state
_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def describe_in_config(model: nn.Module) -> None:
    """Describe the int8 layers of a transformers model in its config; other models have nothing to write to."""
    config = model.__dict__.get("config")
    if not hasattr(config, "to_dict"):
        return
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, Int8Linear)]
    tables = [path for path, module in model.named_modules() if isinstance(module, Int8Embedding)]
    left = [path for path, module in model.named_modules() if original_class(module) is nn.Linear]
    both = [path for path, module in layers if module.scheme != "w8a16"]
    weight_only = [path for path, module in layers if module.scheme == "w8a16"] + tables
    # Without a format of its own, a group that is weight-only would be read as packed into int32.
    groups: dict[str, dict[str, Any]] = {
        name: {"targets": targets, "weights": _WEIGHTS, "input_activations": activations, "format": "int-quantized"}
        for name, targets, activations in (("group_0", both, _ACTIVATIONS), ("group_1", weight_only, None))
    }
    config.quantization_config = {  # type: ignore[union-attr]
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": left,
        "config_groups": {name: group for name, group in groups.items() if group["targets"]},
    }
    # The scheme is in the config; stock loaders would report these keys as unexpected, one by one.
    kept_out = [f"{path}.{_SCHEME}" for path, _ in layers]
    model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *kept_out}  # type: ignore[assignment, misc]


def forget_in_config(model: nn.Module) -> None:
    """Undo `describe_in_config`."""
    config = model.__dict__.get("config")
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # type: ignore[union-attr]
    keys = model.__dict__.get("_keys_to_ignore_on_save")
    if keys is not None:  # transformers has its own there
        model._keys_to_ignore_on_save = {key for key in keys if not key.endswith(f".{_SCHEME}")}  # type: ignore[assignment]


def load_(model: nn.Module, directory: str | Path) -> nn.Module:
    """Load a checkpoint that `save_pretrained` wrote of a quantized model, keeping the codes; returns the model.

    model: of the same architecture in floating point, its values do not matter:
        `load_(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)), directory)`.
    Its parameters take the checkpoint's dtypes.  Raises FileNotFoundError where there is no checkpoint, ValueError
    for a corrupt one or one that does not fit; the model is then as it was.
    """
    directory = Path(directory)
    state = _read(directory)
    scales = {key.removesuffix("_scale") for key in state if key.endswith(".weight_scale")}
    paths = {key.removesuffix(".weight") for key in scales}
    if not paths:
        raise ValueError(f"load_: {directory} has no int8 layers (no tensor is called *.weight_scale)")
    weight_only = _weight_only(directory)
    layers = {layer.path: layer for layer in find_layers(model, (), None)}
    tables = {path: module for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    if missing := sorted(paths - layers.keys() - tables.keys()):
        raise ValueError(f"load_: {directory} has an int8 {missing[0]}, which is no linear layer of the model")
    places = places_of(model)
    with undoing(model):
        for path in sorted(paths & tables.keys()):
            table = tables[path]
            like = table.weight
            rows, columns = like.shape
            int8_table = Int8Embedding(rows, columns, table.padding_idx, like.device, like.dtype)
            replace(places[table], int8_table.train(table.training))
        for path in sorted(paths & layers.keys()):
            layer = layers[path]
            out_features, in_features = layer.shape
            scheme = "w8a16" if path in weight_only else "auto"
            weight = weight_out_in(layer.module)
            has_bias = layer.module.bias is not None
            int8 = Int8Linear(in_features, out_features, has_bias, weight.device, weight.dtype, scheme=scheme)
            int8.from_conv1d = is_conv1d(layer.module)
            replace(layer.places, int8.train(layer.module.training))
        _load_all(model, state, directory)
        describe_in_config(model)
    mind_vocabulary(model)
    return model


def _load_all(model: nn.Module, state: dict[str, Tensor], directory: Path) -> None:
    try:
        keys = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"load_: {directory} does not fit the model: {lines[1] if lines[1:] else lines[0]}") from None
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # type: ignore[operator]
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "meta":
            raise ValueError(
                f"load_: {directory} lacks values for {keys.missing_keys[0] if keys.missing_keys else '?'}"
            )
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    absent = [key for key in keys.missing_keys if key not in tied]
    for what, names in (("lacks", absent), ("has an unexpected", keys.unexpected_keys)):
        if names:
            raise ValueError(f"load_: {directory} {what} {names[0]}")


def _read(directory: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = directory / "model.safetensors.index.json"
    names: Iterable[str] = ["model.safetensors"]
    try:
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if missing := [name for name in names if not (directory / name).is_file()]:
            raise FileNotFoundError(f"load_: {directory / missing[0]} does not exist")
        return {key: value for name in names for key, value in load_file(directory / name).items()}
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"load_: {directory} is corrupt: {str(error).splitlines()[0]}") from None


def _weight_only(directory: Path) -> set[str]:
    """The layers whose activations the config leaves in floating point."""
    try:
        config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        groups = config["quantization_config"]["config_groups"].values()
        return {path for group in groups if not group.get("input_activations") for path in group["targets"]}
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"load_: {directory / 'config.json'} does not describe an int8 model ({type(error).__name__}: {error})"
        ) from None
