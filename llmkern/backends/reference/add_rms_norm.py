from __future__ import annotations

from llmkern.backends.reference import REFERENCE
from llmkern.backends.reference._compose import of_the_sum
from llmkern.backends.reference.rms_norm import rms_norm
from llmkern.dispatch import implements

implements("add_rms_norm", REFERENCE, has_backward=True)(of_the_sum(rms_norm))
