"""Less common ways to call a model: in pieces, with beams, with packed sequences, with masks of the caller's own."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from zoo import SEQUENCE, VOCABULARY, ZOO, Entry

import llmkern

pytestmark = pytest.mark.filterwarnings("ignore:llmkern leaves:UserWarning")

DECODERS = [entry for entry in ZOO if entry.kind == "decoder"]
every_decoder = pytest.mark.parametrize("entry", DECODERS, ids=str)
every_generator = pytest.mark.parametrize("entry", [e for e in ZOO if e.generates], ids=str)


def both(entry: Entry) -> tuple[nn.Module, nn.Module]:
    """The untouched model and an optimized one."""
    model = entry.build()
    llmkern.optimize_(model)
    return entry.build(), model


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Up to what another order of summation in fp32 does to logits of size 1."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@every_decoder
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@torch.no_grad()
def test_a_prompt_in_pieces(entry: Entry, cache: str, padding: str) -> None:
    """Several queries against a cache that is neither empty nor, if it is static, full."""
    inputs = entry.inputs(padding=padding)
    tokens, mask = inputs["input_ids"], inputs.get("attention_mask", torch.ones(2, SEQUENCE, dtype=torch.long))

    def logits(model: nn.Module) -> Tensor:
        if cache == "static":
            past = hf.StaticCache(config=model.config, max_cache_len=SEQUENCE + 5)
        else:
            past = hf.DynamicCache(config=model.config)
        found = []
        for start, stop in ((0, 6), (6, 10), (10, 11), (11, 12)):
            result = model(
                input_ids=tokens[:, start:stop],
                attention_mask=mask[:, :stop] if padding != "none" else None,
                past_key_values=past,
                cache_position=torch.arange(start, stop),
                use_cache=True,
            )
            found.append(result.logits)
        return torch.cat(found, dim=1)[mask.bool()]

    untouched, optimized = both(entry)
    assert_close(logits(optimized), logits(untouched))


@every_generator
def test_beam_search_finds_the_same_beams(entry: Entry) -> None:
    untouched, optimized = both(entry)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    found = [model.generate(**entry.prompt(2, "left"), **options) for model in (optimized, untouched)]
    assert torch.equal(*found)


@every_decoder
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(entry: Entry) -> None:
    """Two sequences in one row, told apart by positions that start again."""
    tokens = entry.inputs(1)["input_ids"]
    packed = {
        "input_ids": tokens,
        "position_ids": torch.tensor([[*range(5), *range(SEQUENCE - 5)]]),
        "use_cache": False,
    }
    untouched, optimized = both(entry)
    ours, theirs = optimized(**packed).logits, untouched(**packed).logits
    assert_close(ours, theirs)


@every_decoder
@torch.no_grad()
def test_a_mask_of_the_callers_own(entry: Entry) -> None:
    """A 4-D additive mask in which every query also sees the first three keys (a prefix language model)."""
    visible = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).tril()
    visible[:, :3] = True
    mask = torch.zeros(SEQUENCE, SEQUENCE).masked_fill(~visible, torch.finfo(torch.float32).min)
    inputs = {**entry.inputs(), "attention_mask": mask.expand(2, 1, SEQUENCE, SEQUENCE)}
    inputs["position_ids"] = torch.arange(SEQUENCE).expand(2, SEQUENCE)  # OPT would count them in the mask
    untouched, optimized = both(entry)
    assert_close(optimized(**inputs).logits, untouched(**inputs).logits)


@pytest.mark.parametrize("entry", [e for e in ZOO if e.kind in ("decoder", "encoder")], ids=str)
@torch.no_grad()
def test_a_row_of_nothing_but_padding_harms_no_other(entry: Entry) -> None:
    inputs = entry.inputs(padding="right")
    inputs["attention_mask"][-1] = 0
    untouched, optimized = both(entry)
    ours = optimized(**inputs).logits
    assert_close(ours[0], untouched(**inputs).logits[0])
    assert not ours.isnan().any()


@pytest.mark.parametrize("entry", [e for e in DECODERS if e.name in ("llama", "gemma2", "gpt2", "gpt_oss")], ids=str)
@torch.no_grad()
def test_many_lengths_and_batches(entry: Entry) -> None:
    """From one token, past the window, to many; nothing may depend on the first call's sizes."""
    untouched, optimized = both(entry)
    for batch, length in ((1, 1), (3, 2), (1, 4), (2, 5), (1, 33), (5, 17)):
        tokens = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))
        assert_close(optimized(input_ids=tokens).logits, untouched(input_ids=tokens).logits)


@pytest.mark.parametrize("copied", [False, True], ids=["", "copied"])
@torch.no_grad()
def test_attention_that_only_its_mask_makes_causal(copied: bool) -> None:
    """Eager attention, as BigBird-Pegasus' decoder has it, never says that it is causal: its mask always does."""
    entry = Entry(
        "bigbird_pegasus",
        "decoder",
        hf.BigBirdPegasusForCausalLM,
        lambda: hf.BigBirdPegasusConfig(
            vocab_size=VOCABULARY, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48
        ),
    )
    untouched, optimized = both(entry)
    if copied:
        optimized = copy.deepcopy(optimized)
    tokens = entry.inputs()["input_ids"]
    assert_close(optimized(input_ids=tokens).logits, untouched(input_ids=tokens).logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_attention_that_says_it_is_not_causal(implementation: str) -> None:
    """Without padding sdpa then gets no mask (PaliGemma's prefix sees all of itself), and eager attention does."""
    entry = next(entry for entry in ZOO if entry.name == "llama")
    untouched, optimized = entry.build(), entry.build()
    for model in (untouched, optimized):
        model.set_attn_implementation(implementation)
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
    llmkern.optimize_(optimized)
    tokens = entry.inputs()["input_ids"]
    assert_close(optimized(input_ids=tokens).logits, untouched(input_ids=tokens).logits)
