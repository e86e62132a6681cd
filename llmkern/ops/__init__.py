"""The ops: one module each, with the public function, its checks, schema, fake and autograd.

Every module of this folder is imported, and its `__all__` is what this package exports: a new op is a new file.
"""

from __future__ import annotations

from llmkern.discovery import import_children

__all__: list[str] = []
for _module in import_children(__name__):
    for _name in _module.__all__:
        globals()[_name] = getattr(_module, _name)
        __all__.append(_name)
del _module, _name
