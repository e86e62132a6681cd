"""Drop-in modules over the ops."""

from llmkern.nn.int8_embedding import Int8Embedding
from llmkern.nn.int8_linear import Int8Linear
from llmkern.nn.packed_embedding import PackedEmbedding
from llmkern.nn.packed_linear import PackedLinear
from llmkern.nn.quantized_embedding import QuantizedEmbedding
from llmkern.nn.quantized_linear import QuantizedLinear

__all__ = [
    "Int8Embedding",
    "Int8Linear",
    "PackedEmbedding",
    "PackedLinear",
    "QuantizedEmbedding",
    "QuantizedLinear",
]
