"""torch.nn.TransformerEncoderLayer: a frame in which its attention and its norms are called as modules.

In eval mode without gradients the layer's own forward takes a fused path that reads their parameters and never calls
them; whatever is swapped within would be passed by in silence.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llmkern.swap.derive import is_own, untouched
from llmkern.swap.guard import UNSEEN, guarded, stated
from llmkern.swap.match import Match

SWITCHES = ("attention", "norms", "mlp")


# The fused path reads only the second of these, unless the layer is in training.
_LEFT_OUT = ("activation", "activation_relu_or_gelu", "self_attn", "dropout", "dropout1", "dropout2")


def find(module: nn.Module) -> Match | None:
    own = is_own(nn.TransformerEncoderLayer, "forward")
    if type(module).forward is not nn.TransformerEncoderLayer.forward or not own:
        return None
    parts = stated(module, *_LEFT_OUT)
    if parts is None:
        return Match("layer", "", UNSEEN)
    return Match("layer", "", cls=guarded(type(module), _forward, parts=parts))


def _forward(
    self: Any,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    reason = None if self.training else self._llmkern_guard.broken(self)
    if src.is_nested:
        reason = "torch.nn.TransformerEncoder has packed the padded batch into a nested tensor"
    if reason is not None:
        return untouched(self, "attention", reason, (src, src_mask, src_key_padding_mask, is_causal), {})
    if self.norm_first:
        x = src + self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal=is_causal)
        return x + self._ff_block(self.norm2(x))
    x = self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask, is_causal=is_causal))
    return self.norm2(x + self._ff_block(x))
