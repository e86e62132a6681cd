from __future__ import annotations

import pytest
import torch

import llmkern
from llmkern.quantization import quantize_
from llmkern.testing.perplexity import perplexity

TOKENS = 20_480


@pytest.mark.real_model
def test_int8_costs_at_most_1_percent_of_perplexity() -> None:
    pytest.importorskip("transformers")
    from llmkern.testing.real_models import load_smollm2, prose

    model, tokenizer = load_smollm2()
    ids = torch.tensor(tokenizer(prose())["input_ids"])[:TOKENS]
    original = perplexity(model, ids)
    report = llmkern.report(quantize_(model)).quantization
    int8 = perplexity(model, ids)
    assert not report.left
    within = [row for row in report if row.path.startswith("model.layers.")]
    w8a8 = sum(row.shape[0] * row.shape[1] for row in within if row.action == "int8 w8a8")
    assert int8 <= 1.01 * original
    assert w8a8 >= 0.5 * sum(row.shape[0] * row.shape[1] for row in within), "most arithmetic is int8 on both sides"
    assert report.bytes_after <= 0.3 * report.bytes_before
