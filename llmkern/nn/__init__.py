"""Drop-in modules over the ops."""

from llmkern.nn.int8_embedding import Int8Embedding
from llmkern.nn.int8_linear import Int8Linear

__all__ = ["Int8Embedding", "Int8Linear"]
