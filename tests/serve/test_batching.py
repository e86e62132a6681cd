"""Continuous batching gives what `generate` gives, on models as they are and optimized, pages read as they lie."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from tiny_server import CONTEXT, tiny_model
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import llmkern
from llmkern.integrations.transformers.paged import PAGED, why_not_paged
from llmkern.serve.manager import Arrived, Manager
from llmkern.serve.options import ServeOptions
from llmkern.serve.sampling import Drawn, History, Sampling

TOKENS = 20


def prompts(count: int = 10) -> list[list[int]]:
    dice = random.Random(1)
    begin = [dice.randrange(256) for _ in range(150)]
    lengths = (1, 2, 5, 64, 65, 128, 200, 33, 129, 7)
    return [(begin if i % 3 == 0 else begin[::-1])[:length] + [i] for i, length in enumerate(lengths[:count])]


def generated(model: Any, prompt: list[int]) -> list[int]:
    with torch.no_grad():
        out = model.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, pad_token_id=257)
    return out[0, len(prompt) :].tolist()


def batched(model: Any, texts: list[list[int]], **options: Any) -> tuple[list[list[int]], Manager]:
    """All at once through the manager."""
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(texts))}
    failed: list[Exception] = []
    done = threading.Event()

    def step(arrived: list[Arrived]) -> None:
        for one in arrived:
            if isinstance(one.outcome, Drawn):
                tokens[one.identity].append(one.outcome.token)
            else:
                failed.append(one.outcome)
        if failed or all(len(each) == TOKENS for each in tokens.values()):
            done.set()

    def die(error: Exception) -> None:
        failed.append(error)
        done.set()

    manager = Manager(model, ServeOptions("tiny", CONTEXT, **({"max_concurrent": 4} | options)), step, die)
    manager.start()
    try:
        for i, text in enumerate(texts):
            manager.submit(str(i), text, TOKENS, [], History(text, Sampling(temperature=0.0), model.device))
        assert done.wait(60)
    finally:
        manager.stop(block=True, hard_stop=True)
    if failed:
        raise failed[0]
    return list(tokens.values()), manager


@pytest.mark.parametrize("optimized", [False, True], ids=["untouched", "optimized"])
def test_tokens_are_those_of_generate(optimized: bool) -> None:
    model = tiny_model()
    if optimized:
        llmkern.optimize_(model)
    found, manager = batched(model, prompts())
    assert found == [generated(model, prompt) for prompt in prompts()]
    assert manager.steps < len(prompts()) * TOKENS / 2  # several in each
    assert model.config._attn_implementation == "sdpa"  # as it was


@pytest.mark.parametrize("optimized", [False, True], ids=["untouched", "optimized"])
def test_tokens_in_bf16_are_likely_to_within_rounding(optimized: bool) -> None:
    model = tiny_model().to(torch.bfloat16)
    if optimized:
        llmkern.optimize_(model)
    found, _ = batched(model, prompts())
    for prompt, tokens in zip(prompts(), found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
        short = logits.amax(-1) - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        # Rows of another shape are rounded otherwise; a token may win that was second by a few units in the last place.
        assert float(short.max()) <= 4 * 2**-8 * float(logits.abs().max())


def test_pages_are_read_by_the_kernels() -> None:
    model = llmkern.optimize_(tiny_model())
    called: list[str] = []
    real = {name: getattr(llmkern.ops, name) for name in ("attention", "attention_varlen", "attention_decode")}

    def watch(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return real[name](*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(llmkern.ops, name, watch(name))
        batched(model, prompts(4))
    assert called.count("attention") == 0  # nothing is collected from pages
    assert 2 <= called.count("attention_varlen") <= 2 * 4  # once in each of 2 layers where a step has a prompt
    assert called.count("attention_decode") + called.count("attention_varlen") >= 2 * TOKENS


def test_long_prompts_go_in_chunks_and_pages_are_shared() -> None:
    model = llmkern.optimize_(tiny_model())
    dice = random.Random(2)
    long = [dice.randrange(256) for _ in range(480)]
    texts = [long, [5], [*long[:300], 1], [*long[:300], 2]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmkern.serve.manager.BATCH_TOKENS", 100)
        found, manager = batched(model, texts, max_concurrent=2)
    assert found == [generated(model, text) for text in texts]
    assert manager.prefix_hits >= 4 * 64


def test_int8_gives_what_int8_generates() -> None:
    from llmkern.quantization import quantize_

    model = llmkern.optimize_(quantize_(tiny_model(), "int8"))
    found, _ = batched(model, prompts())
    assert found == [generated(model, prompt) for prompt in prompts()]


def test_a_sliding_window_keeps_transformers_own_attention() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(
        vocab_size=258, num_key_value_heads=2, max_position_embeddings=CONTEXT, sliding_window=16, **sizes
    )
    model = llmkern.optimize_(MistralForCausalLM(config).eval())
    assert why_not_paged(model.config) is not None
    found, _ = batched(model, prompts(5))
    assert found == [generated(model, prompt) for prompt in prompts(5)]


def test_generate_batch_of_an_optimized_model_is_generate() -> None:
    model = llmkern.optimize_(tiny_model())
    model.generation_config.update(do_sample=False, max_new_tokens=TOKENS, eos_token_id=-1, pad_token_id=257)
    config = ContinuousBatchingConfig(max_batch_tokens=128, num_blocks=16)
    found = model.generate_batch(inputs=prompts(), continuous_batching_config=config)
    assert [found[name].generated_tokens for name in found] == [generated(model, prompt) for prompt in prompts()]


def test_paged_attention_outside_of_a_batch_is_refused() -> None:
    from llmkern.integrations.transformers.paged import register_paged

    register_paged()
    model = tiny_model()
    model.set_attn_implementation(PAGED)
    with pytest.raises(ValueError, match="continuous batching only"):
        model(torch.tensor([[1, 2]]))


def test_a_context_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--max-context is 1073741824, .* fit into memory"):
        Manager(tiny_model(), _huge(), lambda arrived: None, lambda error: None)


def _huge() -> Any:
    options = ServeOptions("tiny", CONTEXT)
    object.__setattr__(options, "max_context", 1 << 30)
    return options
