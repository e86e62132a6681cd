from __future__ import annotations

from llmkern.backends.cpu.gelu import refuse, refuse_backward
from llmkern.backends.cuda import _plan
from llmkern.backends.cuda._declare import serves

serves("gelu", refuse=refuse, describe=_plan.activate("x"), has_backward=True)
serves("gelu_backward", refuse=refuse_backward)
