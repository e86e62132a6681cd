"""A digest of the ops' signatures, by which a native library that is older than the Python beside it is known.

setup.py runs this file by its path, without the package and torch.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

__all__ = ["signatures"]

_SCHEMA = re.compile(r"\bdefine\(\s*((?:\"[^\"]*\"\s*)+)")


def signatures(package: Path) -> str | None:
    """The digest of every schema in the sources of `package`/ops, however they are wrapped; None without sources."""
    found = [
        re.sub(r"\"\s*\"", "", schema).strip()
        for path in sorted((package / "ops").glob("*.py"))
        for schema in _SCHEMA.findall(path.read_text())
    ]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16] if found else None
