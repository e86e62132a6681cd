"""The same function with other weights: a Llama whose weights leave the grid that they were once rounded to.

SmolLM2 as it can be had without a download was dequantized from four bits in blocks of 32: a scheme of that shape
reproduces it exactly and looks lossless.  Four-bit figures are taken on what `rescale_` makes of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

__all__ = ["rescale_"]

SMALLEST, LARGEST = 0.9, 1.1
"""Range of the factors, drawn evenly."""


@torch.no_grad()
def rescale_(model: LlamaForCausalLM, seed: int = 0) -> LlamaForCausalLM:
    """Multiply channels of a Llama in fp32 by factors that its next layer divides by, in place; returns the model.

    Norm weights by s, and the columns that read them by 1/s; value rows, and o_proj's columns; up_proj's rows, and
    down_proj's columns.  The last norm and the embedding stay: a head tied to it reads both.  Products are rounded
    to fp32 once, so that the function is the same up to that.
    """
    generator = torch.Generator().manual_seed(seed)

    def factors(count: int) -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64) * (LARGEST - SMALLEST) + SMALLEST

    def multiply(weight: Tensor, by: Tensor) -> None:
        weight.copy_(weight.double() * by)

    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = config.num_key_value_heads or config.num_attention_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            s = factors(config.hidden_size)
            multiply(norm.weight, s)
            for reader in readers:
                multiply(reader.weight, 1 / s)
        s = factors(values * dim)
        multiply(attention.v_proj.weight, s[:, None])
        by_query = s.view(-1, dim).repeat_interleave(config.num_attention_heads // values, 0).flatten()
        multiply(attention.o_proj.weight, 1 / by_query)
        s = factors(config.intermediate_size)
        multiply(mlp.up_proj.weight, s[:, None])
        multiply(mlp.down_proj.weight, 1 / s)
    return model
