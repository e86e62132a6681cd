"""torch.nn.TransformerEncoderLayer: a frame in which its attention and its norms are called as modules.

In eval mode without gradients the layer's own forward takes a fused path that reads their parameters and never calls
them; whatever is swapped within would be passed by in silence.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llmkern.swap.derive import derive, untouched
from llmkern.swap.found import Found

SWITCHES = ("attention", "norms", "mlp")


def find(module: nn.Module) -> Found | None:
    if type(module).forward is not nn.TransformerEncoderLayer.forward:
        return None
    return Found("layer", "", cls=derive(type(module), _forward))


def _forward(
    self: Any,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    if src.is_nested:
        reason = "torch.nn.TransformerEncoder has packed the padded batch into a nested tensor"
        return untouched(self, "attention", reason, (src, src_mask, src_key_padding_mask, is_causal), {})
    if self.norm_first:
        x = src + self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal=is_causal)
        return x + self._ff_block(self.norm2(x))
    x = self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask, is_causal=is_causal))
    return self.norm2(x + self._ff_block(x))
