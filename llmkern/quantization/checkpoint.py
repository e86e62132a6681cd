"""int8 models on disk, in the compressed-tensors format that transformers and vLLM read.

`quantize_` writes the format's description into the model's transformers config, so that `save_pretrained` gives a
complete checkpoint: `X.weight` int8 [out, in], `X.weight_scale` fp32 [out, 1].  Stock transformers loads it and
dequantizes; `load` keeps the codes.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from llmkern.nn._int8_weight import Int8Weight
from llmkern.quantization.formats import format_of_group, format_of_module
from llmkern.quantization.schemes import Scheme, scheme_to_dict
from llmkern.quantization.undo import undoing
from llmkern.swap.derive import original_class

__all__ = ["describe_in_config", "forget_in_config", "load", "load_", "packed_layers"]

OURS = ("_extra_state", "_floating")
"""State of an int8 module that the config has too, or that has no values: not in checkpoints."""


def describe_in_config(model: nn.Module, scheme: Scheme | None = None) -> None:
    """Describe the int8 layers of a transformers model, as they are now, in its config; other models have none.

    scheme: what was asked for, kept for whoever reads the config (default: what it has of an earlier call).
    """
    config = model.__dict__.get("config")
    if not hasattr(config, "to_dict"):
        return
    known = getattr(config, "quantization_config", None)
    asked = scheme_to_dict(scheme) if scheme else known.get("llmkern") if isinstance(known, dict) else None
    left = [path for path, module in model.named_modules() if original_class(module) is nn.Linear]
    groups: list[dict[str, Any]] = []
    kept_out = []
    for path, module in model.named_modules():
        if (form := format_of_module(module)) is not None:
            described = form.group(module)
            group = next((group for group in groups if described == {k: group[k] for k in described}), None)
            if group is None:
                groups.append(group := {"targets": [], **described})
            group["targets"].append(path)
            kept_out += [f"{path}.{name}" for name in OURS]
    if not groups:
        forget_in_config(model)
        return
    config.quantization_config = {  # type: ignore[union-attr]
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": left,
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        **({"llmkern": asked} if asked else {}),
    }
    # Stock loaders would report these keys as unexpected, one by one.
    model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *kept_out}  # type: ignore[assignment, misc]


def forget_in_config(model: nn.Module) -> None:
    """Undo `describe_in_config`."""
    config = model.__dict__.get("config")
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # type: ignore[union-attr]
    keys = model.__dict__.get("_keys_to_ignore_on_save")
    if keys is not None:  # transformers has its own there
        model._keys_to_ignore_on_save = {key for key in keys if key.rpartition(".")[2] not in OURS}  # type: ignore[assignment]


def packed_layers(model: nn.Module, description: dict[str, Any]) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """Path, module and config group of each layer that the description of a compressed-tensors checkpoint has packed.

    Names of the description are those of the model that was saved, which may have a model like this one within it, or
    be within it.
    """
    prefix = getattr(model, "base_model_prefix", "")
    for path, module in model.named_modules():
        names = (path, f"{prefix}.{path}", path.removeprefix(f"{prefix}."), type(module).__name__)
        if _matches(description.get("ignore") or (), names):
            continue
        for group in description["config_groups"].values():
            if _matches(group["targets"], names):
                yield path, module, group
                break


def _matches(targets: Any, names: tuple[str, ...]) -> bool:
    return any(
        any(re.match(target[3:], name) for name in names) if target.startswith("re:") else target in names
        for target in targets
    )


def load(directory: str | Path, *, model_class: Any = None, **options: Any) -> Any:
    """Load a checkpoint of an int8 model with transformers, keeping the codes; returns the model, in evaluation mode.

    directory: a folder that `save_pretrained` wrote of a quantized model, or another compressed-tensors checkpoint with
        int8 weights per channel.
    model_class: a class of transformers models (default: the one that was saved).
    options: of `from_pretrained`: device_map, attn_implementation …
    Raises FileNotFoundError where there is no checkpoint, ValueError for a corrupt one or one that does not fit.
    """
    return _loaded("load", Path(directory), model_class, options)


def load_(model: nn.Module, directory: str | Path) -> nn.Module:
    """Load a checkpoint of an int8 model into `model`, keeping the codes; returns the model.

    model: a transformers model of the same architecture in floating point, whose values do not matter.  It keeps its
        identity and training flag; its modules are new.
    Raises as `load` does; the model is then as it was.
    """
    cls = original_class(model)
    if not hasattr(cls, "from_pretrained"):
        raise TypeError(f"load_: model is a {cls.__name__}, expected a transformers model")
    loaded = _loaded("load_", Path(directory), cls, {})
    with undoing(model):
        for mine, new in (
            (model._modules, loaded._modules),
            (model._parameters, loaded._parameters),
            (model._buffers, loaded._buffers),
        ):
            mine.clear()
            mine.update(new)
        for name in ("config", "generation_config", "_keys_to_ignore_on_save", "_weight_conversions"):
            if name in loaded.__dict__:
                model.__dict__[name] = loaded.__dict__[name]
        model.train(model.training)
    _give_methods(model)
    return model


def _loaded(what: str, directory: Path, model_class: Any, options: dict[str, Any]) -> Any:
    import transformers

    from llmkern.quantization.transformers_quantizer import Int8Config

    description = _description(what, directory)
    options = {name: value for name, value in options.items() if value is not None}
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
        config.quantization_config = Int8Config(description=description).to_dict()
        cls = model_class or _saved_class(transformers, config)
        with _quiet(transformers):
            model, found = cls.from_pretrained(
                directory,
                **{"config": config, "dtype": "auto", **options},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # the readers raise whatever their formats raise; all of it means that it cannot be used
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{what}: {directory} is corrupt, or does not fit the model: {line}") from error
    missing = sorted(found["missing_keys"])
    for says, keys in (("lacks", missing), ("has an unexpected", sorted(found["unexpected_keys"]))):
        if keys:
            raise ValueError(f"{what}: {directory} {says} {keys[0]}")
    for key, given, expected in found["mismatched_keys"]:
        raise ValueError(f"{what}: {directory} has {key} of shape {list(given)}, expected {list(expected)}")
    for path, module in model.named_modules():
        if isinstance(module, Int8Weight):
            for wrong in module.wrong_values(f"{path}."):
                raise ValueError(f"{what}: {directory}: {wrong}")
    return model


def _description(what: str, directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise FileNotFoundError(f"{what}: {directory} is no folder")
    if not any(directory.glob("*.safetensors")):
        raise FileNotFoundError(f"{what}: {directory / 'model.safetensors'} does not exist")
    try:
        description: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
        if description["quant_method"] != "compressed-tensors" or not description["config_groups"]:
            raise KeyError("config_groups")
        for group in description["config_groups"].values():
            format_of_group(group)
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{what}: {directory / 'config.json'} does not describe an int8 model ({type(error).__name__}: {error})"
        ) from None
    except ValueError as error:
        raise ValueError(f"{what}: {directory} is no int8 model: {error}") from None
    return description


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' table of what is missing: that is an error here, and one line."""
    log = transformers.utils.logging
    level = log.get_verbosity()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(level)


def _saved_class(transformers: Any, config: Any) -> Any:
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModel


def _give_methods(model: nn.Module) -> None:
    from llmkern.quantization.methods import give_methods  # whose save_pretrained loads, by this module

    give_methods(model)
