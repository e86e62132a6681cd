"""Interfaces of vLLM that the plugin builds on: written down where vLLM is installed, and stood in for elsewhere.

python tests/integrations/vllm_interfaces.py    # writes vllm_interfaces.json; part of `make vllm`
"""

from __future__ import annotations

import abc
import inspect
import json
import sys
import types
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

RECORDED = Path(__file__).with_suffix(".json")
LAYERS = "vllm.model_executor.layers"
CLASSES = {
    f"{LAYERS}.quantization.base_config": ("QuantizeMethodBase", "QuantizationConfig"),
    f"{LAYERS}.linear": ("LinearMethodBase", "UnquantizedLinearMethod", "LinearBase"),
    f"{LAYERS}.vocab_parallel_embedding": ("UnquantizedEmbeddingMethod", "VocabParallelEmbedding"),
    f"{LAYERS}.activation": ("SiluAndMul",),
    "vllm.model_executor.parameter": (
        "BasevLLMParameter",
        "ModelWeightParameter",
        "ChannelQuantScaleParameter",
        "GroupQuantScaleParameter",
        "PackedvLLMParameter",
    ),
}
FUNCTIONS = {
    f"{LAYERS}.quantization": ("register_quantization_config",),
    f"{LAYERS}.linear": ("register_weight_loader_v2_supported_method",),
    "vllm.model_executor.utils": ("set_weight_attrs",),
}
VALUES = {f"{LAYERS}.quantization": ("QUANTIZATION_METHODS",), "vllm.model_executor.custom_op": ("op_registry_oot",)}
IR_OPS = ("rms_norm", "fused_add_rms_norm")


def parameters(function: Callable[..., Any]) -> list[str]:
    """Names of a function's parameters, as they are written: `bias=` has a default, `*` and `**` collect."""
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    found = inspect.signature(function).parameters.values()
    return [f"{marks.get(p.kind, '')}{p.name}{'' if p.default is p.empty else '='}" for p in found]


def record() -> dict[str, Any]:
    """Describe the interfaces of the vLLM that is installed.  Raises AttributeError for one that is gone."""
    import vllm
    from vllm import ir

    classes: dict[str, Any] = {}
    named = {getattr(import_module(home), name): f"{home}:{name}" for home, names in CLASSES.items() for name in names}
    for cls, name in named.items():
        if issubclass(cls, torch.Tensor):
            methods = {"__init__": parameters(cls.__init__)}
        else:
            methods = {
                each: parameters(value)
                for each, value in inspect.getmembers(cls, callable)
                if not each.startswith("_") and not (issubclass(cls, nn.Module) and hasattr(nn.Module, each))
            }
        bases = [named[base] for base in cls.__mro__[1:] if base in named]
        abstract = sorted(getattr(cls, "__abstractmethods__", ()))
        classes[name] = {"bases": bases[:1], "abstract": abstract, "methods": methods}
    for home, names in VALUES.items():
        for name in names:
            getattr(import_module(home), name)
    return {
        "vllm": vllm.__version__,
        "classes": classes,
        "functions": {
            f"{home}:{name}": parameters(getattr(import_module(home), name))
            for home, names in FUNCTIONS.items()
            for name in names
        },
        "ir_ops": {name: parameters(getattr(ir.ops, name).impls["native"].impl_fn) for name in IR_OPS},
    }


def stand_in() -> dict[str, types.ModuleType]:
    """Modules with the recorded interfaces and next to no behaviour, for `sys.modules`."""
    recorded = json.loads(RECORDED.read_text())
    modules: dict[str, types.ModuleType] = {}

    def module(name: str) -> types.ModuleType:
        parent, _, child = name.rpartition(".")
        if name not in modules:
            modules[name] = types.ModuleType(name)
            if parent:
                setattr(module(parent), child, modules[name])
        return modules[name]

    module("vllm").__version__ = recorded["vllm"]  # type: ignore[attr-defined]
    made: dict[str, type] = {}
    for path, described in recorded["classes"].items():
        home, _, name = path.partition(":")
        bases = tuple(made[base] for base in described["bases"]) or _bases(home, name)
        methods = {each: _unwritten(each, names) for each, names in described["methods"].items()}
        if home.endswith(".parameter"):
            methods = {"__new__": _new_parameter, "__init__": _init_parameter(described["methods"]["__init__"])}
        for each in described["abstract"]:
            methods[each].__isabstractmethod__ = True  # type: ignore[attr-defined]
        made[path] = type(bases[0])(name, bases, {**methods, "__module__": home})
        setattr(module(home), name, made[path])
    methods_there: list[str] = []
    registry: dict[str, type] = {}

    def register_quantization_config(quantization: str) -> Callable[[type], type]:
        assert quantization not in methods_there
        methods_there.append(quantization)
        return lambda cls: configs.setdefault(quantization, cls)

    configs: dict[str, type] = {}
    quantization = module(f"{LAYERS}.quantization")
    quantization.register_quantization_config = register_quantization_config  # type: ignore[attr-defined]
    quantization.QUANTIZATION_METHODS = methods_there  # type: ignore[attr-defined]
    quantization.configs = configs  # type: ignore[attr-defined]
    linear: Any = module(f"{LAYERS}.linear")
    linear.register_weight_loader_v2_supported_method = lambda cls: cls
    module("vllm.model_executor.utils").set_weight_attrs = _set_attributes  # type: ignore[attr-defined]
    module("vllm.model_executor.custom_op").op_registry_oot = registry  # type: ignore[attr-defined]
    activation: Any = made[f"{LAYERS}.activation:SiluAndMul"]
    activation.register_oot = classmethod(lambda cls, layer, name: registry.__setitem__(name, layer))
    module("vllm.ir").ops = types.SimpleNamespace(  # type: ignore[attr-defined]
        **{name: IrOp(names) for name, names in recorded["ir_ops"].items()}
    )
    return modules


class IrOp:
    """Stand-in for an op of `vllm.ir`: providers must have its parameters, all of them annotated."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self.impls: dict[str, Callable[..., Any]] = {}

    def register_impl(
        self, provider: str, *, supported: bool = True, supports_args: Any = None, inplace: bool = False
    ) -> Any:
        def take(implementation: Callable[..., Any]) -> Callable[..., Any]:
            assert provider not in self.impls
            assert parameters(implementation) == parameters(supports_args) == self._names
            unnamed = [
                name.rstrip("=") for name in self._names if name.rstrip("=") not in implementation.__annotations__
            ]
            assert unnamed == []
            self.impls[provider] = implementation
            return implementation

        return take


def _bases(home: str, name: str) -> tuple[type, ...]:
    if home.endswith(".parameter"):
        return (nn.Parameter,)
    return (nn.Module,) if name in ("LinearBase", "VocabParallelEmbedding", "SiluAndMul") else (abc.ABC,)


def _unwritten(name: str, names: list[str]) -> Any:
    def method(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(name)

    kinds = {0: inspect.Parameter.POSITIONAL_OR_KEYWORD, 1: inspect.Parameter.VAR_POSITIONAL}
    found = []
    for each in names:
        kind = kinds.get(each.count("*"), inspect.Parameter.VAR_KEYWORD)
        default = None if each.endswith("=") else inspect.Parameter.empty
        found.append(inspect.Parameter(each.strip("*="), kind, default=default))
    method.__signature__ = inspect.Signature(found)  # type: ignore[attr-defined]
    return method


def _new_parameter(cls: type, data: torch.Tensor, **attributes: Any) -> Any:
    return nn.Parameter.__new__(cls, data, False)


def _init_parameter(names: list[str]) -> Callable[..., None]:
    taken = {name.rstrip("=") for name in names}

    def __init__(self: Any, data: torch.Tensor, **attributes: Any) -> None:
        assert "**kwargs" in taken or set(attributes) <= taken
        _set_attributes(self, attributes)

    return __init__


def _set_attributes(weight: Any, weight_attrs: dict[str, Any]) -> None:
    for name, value in weight_attrs.items():
        setattr(weight, name, value)


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(record(), indent=1) + "\n")
    print(f"written to {RECORDED}", file=sys.stderr)
