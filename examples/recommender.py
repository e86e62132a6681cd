"""Recommend the next item with a sequential recommender in plain torch.nn (SASRec: Kang & McAuley 2018).

python examples/recommender.py
"""

import time

import torch
from torch import nn

import llmkern

ITEMS, LENGTH, HIDDEN = 10_000, 200, 128


class SASRec(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items, self.positions = nn.Embedding(ITEMS, HIDDEN), nn.Embedding(LENGTH, HIDDEN)
        layer = nn.TransformerEncoderLayer(HIDDEN, 2, HIDDEN, 0.2, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(HIDDEN), enable_nested_tensor=False)

    def forward(self, history: torch.Tensor) -> torch.Tensor:  # [users, LENGTH] of items → scores of the next one
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, device=history.device)
        hidden = self.layers(self.items(history) + self.positions.weight, mask=mask, is_causal=True)
        return hidden[:, -1] @ self.items.weight.T


@torch.no_grad()
def recommend(model: nn.Module, history: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Each user's best item, and how many users were served in a second; the first call only warms up."""
    for _ in range(2):
        start = time.perf_counter()
        best = model(history).argmax(-1)
        seconds = time.perf_counter() - start
    return best, len(history) / seconds


model, history = SASRec().eval(), torch.randint(ITEMS, (32, LENGTH))
before, untouched = recommend(model, history)
llmkern.optimize_(model)
print(llmkern.report(model))
after, optimized = recommend(model, history)
print(f"the same item for {int((before == after).sum())} of {len(history)} users")
print(f"untouched {untouched:.0f} users/s, optimized {optimized:.0f} users/s")
