"""Under torch.autocast, where activations, weights and rotary angles have different dtypes."""

from __future__ import annotations

import pytest
import torch
from test_zoo import untouched
from zoo import ZOO, Entry

import llmkern
from llmkern.testing.compare import assert_as_accurate

pytestmark = pytest.mark.filterwarnings("ignore:llmkern leaves:UserWarning")


@pytest.mark.parametrize(
    "entry", [e for e in ZOO if str(e) in ("llama", "gemma2", "gpt2", "bert", "t5", "vit")], ids=str
)
def test_autocast_is_as_accurate_and_trains_as_before(entry: Entry) -> None:
    padding = entry.paddings[-1]
    _, exact = untouched(entry, torch.float32, padding)
    inputs = entry.inputs(padding=padding)
    results = []
    for optimize in (False, True):
        model = entry.build()
        if optimize:
            llmkern.optimize_(model)
        with torch.autocast("cpu", torch.bfloat16):
            out = entry.at_kept_positions(entry.output(model(**inputs)), inputs)
        out.float().square().mean().backward()
        results.append((out.detach(), {name for name, p in model.named_parameters() if p.grad is not None}))
    (baseline, trained_before), (out, trained) = results
    assert out.dtype == baseline.dtype
    assert trained == trained_before
    assert_as_accurate(out, baseline=baseline, exact=exact)
