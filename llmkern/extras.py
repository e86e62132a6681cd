"""Optional dependencies: an absent one is a sentence with what to install."""

from __future__ import annotations

import importlib.util

__all__ = ["need"]


def need(what: str, extra: str, *modules: str) -> None:
    """Raise ModuleNotFoundError where a module is not installed: `what` needs it, the extra `extra` installs it."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        named = " and ".join(name.replace("_", "-") for name in missing)
        raise ModuleNotFoundError(
            f"{what} needs {named}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install 'llmkern[{extra}]'"
        )
