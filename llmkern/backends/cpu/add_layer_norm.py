from __future__ import annotations

from typing import Any

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES, refuse_few, refuse_norm
from llmkern.backends.cpu.layer_norm import LEAST
from llmkern.dispatch import implements
from llmkern.library import native


def _refuse(**call: Any) -> str | None:
    return refuse_few(LEAST, x=call["x"]) or refuse_norm(**call)


implements("add_layer_norm", CPU, dtypes=DTYPES, refuse=_refuse)(native("add_layer_norm"))
