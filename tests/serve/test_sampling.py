"""The next token against the formulas, written out."""

from __future__ import annotations

import collections

import pytest
import torch

from llmkern.serve.sampling import Drawn, History, Sampling, draw

VOCABULARY = 3000


def logits_of(seed: int = 0, size: int = VOCABULARY) -> torch.Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def drawn(logits: torch.Tensor, sampling: Sampling, history: History | None = None) -> Drawn:
    (found,) = draw(logits[None], [history or History([1], sampling, logits.device)])
    assert isinstance(found, Drawn)
    return found


def test_temperature_0_is_the_largest_logit() -> None:
    logits = logits_of()
    assert drawn(logits, Sampling(temperature=0.0)).token == int(logits.argmax())


def test_a_seed_gives_the_same_tokens_whoever_is_beside() -> None:
    logits = torch.stack([logits_of(i) for i in range(4)])
    sampling = Sampling(seed=7)

    def tokens(rows: list[int]) -> list[int]:
        histories = [History([1], sampling if i == 2 else Sampling(), logits.device) for i in rows]
        return [draw(logits[rows], histories)[rows.index(2)].token for _ in range(20)]  # type: ignore[union-attr]

    alone = tokens([2])
    assert tokens([0, 1, 2, 3]) == alone
    assert len(set(alone)) > 1
    assert [drawn(logits[2], Sampling(seed=8)).token for _ in range(1)] != alone[:20]


@pytest.mark.parametrize("size", [50, VOCABULARY])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.3), (5, 1.0), (20, 0.6), (0, 0.999)])
def test_only_tokens_of_the_nucleus_are_drawn(size: int, top_k: int, top_p: float) -> None:
    logits = logits_of(3, size)
    order = logits.argsort(descending=True)[: top_k or size]
    shares = logits[order].softmax(-1)
    allowed = {int(t) for t, before in zip(order, shares.cumsum(0) - shares, strict=True) if before < top_p}
    sampling = Sampling(top_k=top_k, top_p=top_p, seed=0)
    history = History([1], sampling, logits.device)
    found = {drawn(logits, sampling, history).token for _ in range(300)}
    assert found <= allowed
    assert len(found) >= min(3, len(allowed))


def test_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    sampling = Sampling(temperature=0.5, seed=1)
    history = History([1], sampling, logits.device)
    counts = collections.Counter(drawn(logits, sampling, history).token for _ in range(4000))
    for token, share in enumerate((logits / 0.5).softmax(-1).tolist()):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.03)


def test_penalties_and_bias_are_the_formulas() -> None:
    logits = logits_of(1, 10)
    sampling = Sampling(frequency_penalty=0.5, presence_penalty=0.25, repetition_penalty=1.3, logit_bias={9: 4.0})
    history = History([0, 3], sampling, logits.device)
    for token in (3, 5, 5):
        history.add(token)
    want = logits.clone()
    want[9] += 4.0
    for token in (0, 3, 5):  # the prompt's and the answer's
        want[token] = want[token] / 1.3 if want[token] > 0 else want[token] * 1.3
    want[3] -= 0.5 * 1 + 0.25
    want[5] -= 0.5 * 2 + 0.25
    torch.testing.assert_close(history.penalise(logits), want)


def test_logprobs_are_the_models_own() -> None:
    logits = logits_of(2, 10)
    want = logits.log_softmax(-1)
    found = drawn(logits, Sampling(temperature=0.0, logprobs=3, logit_bias={4: 100.0}))
    assert found.token == 4
    assert found.logprob == pytest.approx(float(want[4]))
    assert [token for token, _ in found.top] == want.topk(3).indices.tolist()


def test_a_row_that_fails_leaves_the_others() -> None:
    logits = torch.stack([logits_of(0), torch.full((VOCABULARY,), float("nan")), logits_of(2)])
    histories = [History([1], Sampling(seed=0), logits.device) for _ in range(3)]
    first, second, third = draw(logits, histories)
    assert isinstance(first, Drawn)
    assert isinstance(second, RuntimeError)
    assert isinstance(third, Drawn)
