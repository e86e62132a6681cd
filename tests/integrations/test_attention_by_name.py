"""attn_implementation="llmkern", right after `import llmkern`."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import transformers as hf

import llmkern
from llmkern.integrations.transformers import by_name

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
LLAMA = hf.LlamaConfig(**TINY, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None)


def test_the_name_is_known_after_import_llmkern() -> None:
    """Whoever imports transformers later finds it.  The finder has gone by then, and the module has its own loader."""
    code = """
import sys, llmkern, transformers.modeling_utils as module
from transformers import AttentionInterface, AttentionMaskInterface
print("llmkern" in AttentionInterface().valid_keys(), "llmkern" in AttentionMaskInterface().valid_keys())
print(type(module.__spec__.loader).__name__, [f for f in sys.meta_path if "llmkern" in type(f).__module__])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["True True", "SourceFileLoader []"], done.stderr


def test_the_name_is_known_where_transformers_was_imported_before(monkeypatch) -> None:
    registered = []
    monkeypatch.setattr(by_name, "_register", lambda: registered.append("llmkern"))
    by_name.register_when_imported()
    assert registered == ["llmkern"]


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (hf.LlamaForCausalLM, LLAMA),
        (hf.MistralForCausalLM, hf.MistralConfig(**TINY, num_key_value_heads=2, sliding_window=4, pad_token_id=0)),
        (hf.BertModel, hf.BertConfig(**TINY)),
    ],
    ids=["llama", "mistral", "bert"],
)
@torch.no_grad()
def test_a_model_gives_what_it_gives_under_sdpa(cls, config) -> None:
    torch.manual_seed(0)
    theirs = cls._from_config(copy.deepcopy(config), attn_implementation="sdpa").eval()
    ours = cls._from_config(copy.deepcopy(config), attn_implementation="llmkern").eval()
    ours.load_state_dict(theirs.state_dict())
    ids, mask = torch.randint(3, 64, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    for options in ({}, {"attention_mask": mask}):
        calls = llmkern.explain(ours, input_ids=ids, **options)
        assert "attention" in {call.op for call in calls}
        kept = options.get("attention_mask", torch.ones_like(mask)).bool()
        expected, got = (model(input_ids=ids, **options)[0][kept] for model in (theirs, ours))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_the_op_cannot_do_goes_to_transformers_with_a_reason() -> None:
    model = hf.LlamaForCausalLM._from_config(copy.deepcopy(LLAMA), attn_implementation="llmkern").eval()
    ids = torch.randint(3, 64, (1, 5))
    weights = model(input_ids=ids, output_attentions=True).attentions
    assert weights[0].shape == (1, 4, 5, 5)
    assert "output_attentions" in str(llmkern.explain(model, input_ids=ids, output_attentions=True))
