"""Save and load quantized models in the compressed-tensors formats that transformers and vLLM read.

`quantize_` writes the formats' description into the model's transformers config, so that `save_pretrained` gives a
complete checkpoint, whose tensors `formats/` describes.  Stock transformers loads it and dequantizes; `load` keeps the
codes.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from llmkern.nn._quantized_weight import QuantizedWeight
from llmkern.quantization.formats import format_of_group, format_of_module
from llmkern.quantization.schemes import Scheme, scheme_to_dict
from llmkern.quantization.undo import undoing
from llmkern.swap.derive import original_class

__all__ = [
    "describe_in_config",
    "forget_in_config",
    "group_of",
    "groups_of",
    "load",
    "load_",
    "packed_layers",
    "readable",
    "refuse_wrong_values",
    "tensor_names",
]

OURS = ("_extra_state", "_floating")
"""State of a quantized module that the config has too, or that has no values: not in checkpoints."""


def describe_in_config(model: nn.Module, scheme: Scheme | None = None, *, to_save: bool = False) -> None:
    """Describe a transformers model's quantized layers, as they are now, in its config; does nothing for other models.

    scheme: what was asked for, kept for whoever reads the config (default: what it has of an earlier call).
    to_save: whether a layer that has no form in a checkpoint raises ValueError; else the config then says nothing.
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
            assert form.group is not None  # it has modules
            try:
                described = form.group(module)
            except ValueError as error:
                forget_in_config(model)
                if to_save:
                    raise ValueError(
                        f"save_pretrained: {path} is {error}; llmkern.dequantize_(model) can be saved"
                    ) from None
                return
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
        "format": written.pop() if len(written := {group["format"] for group in groups}) == 1 else "mixed-precision",
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
        if (group := group_of(description, names)) is not None:
            yield path, module, group


def group_of(description: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any] | None:
    """Return the config group of the layer that has these names, or None if it is in floating point."""
    if _matches(description.get("ignore") or (), names):
        return None
    return next((group for group in groups_of(description) if _matches(group["targets"], names)), None)


def groups_of(description: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the config groups, each with its format: the checkpoint's if it has none of its own."""
    whole = description.get("format")
    own = {} if whole in (None, "mixed-precision") else {"format": whole}
    return [{**group, **({} if group.get("format") else own)} for group in description["config_groups"].values()]


def _matches(targets: Any, names: tuple[str, ...]) -> bool:
    return any(
        any(re.match(target[3:], name) for name in names) if target.startswith("re:") else target in names
        for target in targets
    )


def load(directory: str | Path, *, model_class: Any = None, **options: Any) -> Any:
    """Load a checkpoint of a quantized model with transformers, keeping the codes; returns it in evaluation mode.

    directory: a .gguf file, whose blocks are kept as they are, embeddings and head included (`gguf_quantizer.py`); or
        a folder that `save_pretrained` wrote of a quantized model, another compressed-tensors checkpoint with int8
        weights per channel or packed weights of 4 to 8 bits, or one of GPTQ or AWQ (`formats/`).
    model_class: a class of transformers models (default: the one that was saved).
    options: of `from_pretrained`: device_map, attn_implementation …
    Raises FileNotFoundError where there is no checkpoint, ValueError for a corrupt one or one that does not fit.
    """
    path = Path(directory).expanduser()
    if path.suffix == ".gguf":
        return _load_gguf(path, model_class, options)
    return _loaded("load", path, model_class, options)


def _load_gguf(path: Path, model_class: Any, options: dict[str, Any]) -> Any:
    try:
        from llmkern.quantization.gguf_quantizer import load_gguf
    except (ImportError, KeyError) as error:
        raise ValueError(f"load: {path} needs the packages gguf and transformers 5.20 or newer ({error})") from None
    return load_gguf(path, model_class, {name: value for name, value in options.items() if value is not None})


def load_(model: nn.Module, directory: str | Path) -> nn.Module:
    """Load a checkpoint of a quantized model into `model`, keeping the codes; returns the model.

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

    from llmkern.quantization.transformers_quantizer import QuantConfig

    description = _description(what, directory)
    options = {name: value for name, value in options.items() if value is not None}
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
        config.quantization_config = QuantConfig(description=description).to_dict()
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
    refuse_wrong_values(f"{what}: {directory}", model)
    return model


def _description(what: str, directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise FileNotFoundError(f"{what}: {directory} is no folder")
    if not any(directory.glob("*.safetensors")):
        raise FileNotFoundError(f"{what}: {directory / 'model.safetensors'} does not exist")
    config = directory / "config.json"
    try:
        description = json.loads(config.read_text())["quantization_config"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{what}: {config} does not describe a quantized model ({type(error).__name__}: {error})"
        ) from None
    return readable(what, config, description, directory.glob("*.safetensors"))


def readable(what: str, place: str | Path, description: Any, files: Iterable[str | Path]) -> dict[str, Any]:
    """Return the description of a quantized checkpoint, by anyone, as config groups that name its layers.

    files: the checkpoint's safetensors files.  place: what errors name.
    Raises ValueError with one line where llmkern does not read such a checkpoint.
    """
    try:
        if description["quant_method"] in ("gptq", "awq"):
            description = _by_names(files, description)
        elif description["quant_method"] != "compressed-tensors" or not description["config_groups"]:
            raise KeyError("config_groups")
        groups = groups_of(description)
        refused = _refused(description)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{what}: {place} does not describe a quantized model ({type(error).__name__}: {error})"
        ) from None
    try:
        for group in groups:
            format_of_group(group)
        if refused:
            raise ValueError(refused)
    except ValueError as error:
        raise ValueError(f"{what}: {place} is no quantized model that llmkern reads: {error}") from None
    return dict(description)


def _refused(description: dict[str, Any]) -> str:
    """Return what a compressed-tensors description asks for beyond weights, or ""."""
    if description.get("kv_cache_scheme"):
        return "its kv_cache_scheme is set, expected none"
    sparsity = (description.get("sparsity_config") or {}).get("format") or "dense"
    return "" if sparsity == "dense" else f"its sparsity_config has format {sparsity!r}, expected 'dense'"


def _by_names(files: Iterable[str | Path], config: dict[str, Any]) -> dict[str, Any]:
    """List the layers that have a `qweight` in the checkpoint: GPTQ's and AWQ's configs do not name layers."""
    names = tensor_names(files)
    paths = [name.removesuffix(".qweight") for name in sorted(names) if name.endswith(".qweight")]
    group = {
        **{key: config.get(key) for key in ("bits", "group_size", "sym", "checkpoint_format", "version")},
        "format": config["quant_method"],
        "targets": paths,
        "biased": [path for path in paths if f"{path}.bias" in names],
        "ordered": [path for path in paths if f"{path}.g_idx" in names],
    }
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def tensor_names(files: Iterable[str | Path]) -> set[str]:
    """Return the names of all tensors in these safetensors files."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names |= set(opened.keys())
    return names


def refuse_wrong_values(what: str, model: nn.Module) -> None:
    """Raise ValueError, naming the tensor, where a quantized layer was loaded with values that have no meaning."""
    for path, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            for wrong in module.wrong_values(f"{path}."):
                raise ValueError(f"{what}: {wrong}")


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Hide transformers' table of missing tensors within the block; they are reported as a one-line error."""
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
