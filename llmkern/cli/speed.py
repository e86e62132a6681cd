"""Speed of language models side by side, for `llmkern check`; `llmkern bench model` measures in earnest."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Speed", "speeds"]

PROMPT, STEPS, ROUNDS = 256, 16, 3


@dataclass(frozen=True)
class Speed:
    """Tokens a second: of a prompt, and of those that follow it one by one."""

    prefill: float
    decode: float


def speeds(models: dict[str, nn.Module], ids: Tensor) -> dict[str, Speed]:
    """The best of a few rounds each, in turn.  ids: [tokens], of which a prompt is taken."""
    config: Any = next(iter(models.values())).config
    limit = getattr(config, "max_position_embeddings", None) or PROMPT + STEPS + 1
    ids = ids[: max(min(PROMPT, limit - STEPS - 1), 1)]
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            runs[name].append(_seconds(model, ids[None]))
    return {
        name: Speed(ids.numel() / min(first for first, _ in each), STEPS / min(rest for _, rest in each))
        for name, each in runs.items()
    }


@torch.inference_mode()
def _seconds(model: Any, ids: Tensor) -> tuple[float, float]:
    """Seconds of the prompt, and of the steps after it."""
    from llmkern.integrations.transformers.cache import KVCache

    cache = KVCache(model.config)
    ends = [_now(ids)]
    for _ in range(1 + STEPS):
        ids = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        ends.append(_now(ids))
    return ends[1] - ends[0], ends[-1] - ends[1]


def _now(ids: Tensor) -> float:
    if ids.device.type == "cuda":
        torch.cuda.synchronize(ids.device)
    return time.perf_counter()
