from __future__ import annotations

from llmkern.backends.cpu.rope import refuse
from llmkern.backends.cuda import _plan
from llmkern.backends.cuda._declare import serves

serves("rope", refuse=refuse, describe=_plan.rope)
