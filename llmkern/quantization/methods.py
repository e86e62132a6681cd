"""Replace methods of a transformers model, in its `__dict__`, once it is quantized.

transformers' `resize_token_embeddings` and `tie_weights` know floating-point weights only: the first would fail, with
an int8 head half-way, and the second would leave codes of one layer with the scales of another (`vocabulary.py`).
`save_pretrained` writes what it can, and not always what can be read (`saving.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from llmkern.quantization.saving import save_pretrained
from llmkern.quantization.vocabulary import resize_token_embeddings, tie_weights

__all__ = ["forget_methods", "give_methods"]

_METHODS: dict[str, Callable[..., Any]] = {
    "resize_token_embeddings": resize_token_embeddings,
    "save_pretrained": save_pretrained,
    "tie_weights": tie_weights,
}


def give_methods(model: nn.Module) -> None:
    """Give the transformers models in `model`, itself included, the methods of a quantized model."""
    for module in model.modules():
        if hasattr(type(module), "_tied_weights_keys"):  # of transformers models alone: peft's save what they add
            for name in _METHODS:
                if callable(getattr(type(module), name, None)):
                    module.__dict__[name] = _Method(name, module)


def forget_methods(model: nn.Module) -> None:
    """Undo `give_methods`."""
    for module in model.modules():
        for name in _METHODS:
            if isinstance(module.__dict__.get(name), _Method):
                del module.__dict__[name]


class _Method:
    """A function of a model, kept in the model's own `__dict__`: it does not keep the model alive, and is copied and
    pickled with it."""

    def __init__(self, name: str, model: nn.Module) -> None:
        self._name, self._model = name, weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _METHODS[self._name](self._model(), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Method:
        model: Any = self._model()
        return _Method(self._name, memo.get(id(model), model))

    def __reduce__(self) -> Any:
        return _Method, (self._name, self._model())
