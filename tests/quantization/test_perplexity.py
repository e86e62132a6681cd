from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llmkern.testing.perplexity import perplexity


class Uniform(nn.Module):
    """Knows nothing: every token is as likely."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.windows: list[int] = []

    def forward(self, input_ids, use_cache):
        self.windows.append(input_ids.shape[1])
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 50))


def test_knowing_nothing_is_the_size_of_the_vocabulary() -> None:
    model, seen = Uniform(), []
    value = perplexity(model, torch.arange(50), context=16, progress=lambda done, total: seen.append((done, total)))
    assert value == pytest.approx(50)
    assert model.windows == [16, 16, 16]
    assert seen == [(16, 48), (32, 48), (48, 48)]


def test_a_text_shorter_than_a_window_is_one_window() -> None:
    model = Uniform()
    perplexity(model, torch.arange(7), context=512)
    assert model.windows == [7]


def test_each_token_is_predicted_from_those_before_it() -> None:
    class Next(Uniform):
        """Puts probability 1/2 on the successor, and the rest on the others alike."""

        def forward(self, input_ids, use_cache):
            logits = torch.full((*input_ids.shape, 50), math.log(0.5 / 49))
            logits.scatter_(-1, ((input_ids + 1) % 50).unsqueeze(-1), math.log(0.5))
            return SimpleNamespace(logits=logits)

    assert perplexity(Next(), torch.arange(40), context=20) == pytest.approx(2)


@pytest.mark.parametrize(
    ("exception", "message", "ids", "context"),
    [
        (TypeError, "token_ids is torch.float32, expected an integer dtype", torch.zeros(5), 4),
        (ValueError, r"token_ids has shape \[1, 5\], expected \[tokens\]", torch.zeros(1, 5, dtype=torch.long), 4),
        (ValueError, "context is 1, expected at least 2", torch.arange(5), 1),
    ],
)
def test_bad_input(exception, message, ids, context) -> None:
    with pytest.raises(exception, match=f"perplexity: {message}"):
        perplexity(Uniform(), ids, context=context)


def test_a_cache_is_read_and_changes_nothing_but_int8_does(tiny_llama) -> None:
    import llmkern

    ids = torch.randint(128, (96,), generator=torch.Generator().manual_seed(2))
    made = []

    def cache(dtype: str | None):
        made.append(llmkern.KVCache(tiny_llama.config, dtype=dtype))
        return made[-1]

    without = perplexity(tiny_llama, ids, context=48)
    assert perplexity(tiny_llama, ids, context=48, cache=lambda: cache(None)) == pytest.approx(without, rel=1e-5)
    assert [c.get_seq_length() for c in made] == [48, 48]
    int8 = perplexity(tiny_llama, ids, context=48, cache=lambda: cache("int8"))
    assert int8 != pytest.approx(without, rel=1e-7)
    assert int8 == pytest.approx(without, rel=1e-2)
