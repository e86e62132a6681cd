"""`attn_implementation="llmkern"`, and `from_pretrained` that keeps codes: names in transformers' own registries.

Nothing changes for models that ask for neither.  Registering takes transformers, which takes seconds to import and
which llmkern needs only where there is a model of it.  So `import llmkern` leaves a finder that registers the names
when transformers is imported, or registers them at once where that has happened already.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register_when_imported"]

_REGISTRIES = "transformers.modeling_utils"
"""The module with both registries; a model cannot be made without it."""


def register_when_imported() -> None:
    """Make the name known as soon as transformers' registries are there."""
    if _REGISTRIES in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from llmkern.integrations.transformers import attention, checkpoints

    attention.register_once()
    checkpoints.register_once()


class _Finder(MetaPathFinder):
    """Finds one module, once, as those behind it do, and registers the name when that has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRIES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Executes a module by its own loader, to which it gives its place back."""

    def __init__(self, theirs: Loader) -> None:
        self.theirs = theirs

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.theirs.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.theirs
        self.theirs.exec_module(module)
        _register()
