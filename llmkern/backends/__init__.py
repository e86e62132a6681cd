"""The backends: one folder each.  Its `__init__` registers the backend; `<op>.py` holds an op's implementation."""

from __future__ import annotations

import llmkern.ops  # noqa: F401  (implementations are declared against defined ops)
from llmkern.discovery import import_children

for _backend in import_children(__name__):
    import_children(_backend.__name__)
del _backend
