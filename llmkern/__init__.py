"""llmkern: hand-written kernels swapped into the transformer models people already run."""

from llmkern import backends as backends
from llmkern import ops
from llmkern.dispatch import implements, register, use_backend

__all__ = ["implements", "ops", "register", "use_backend"]
