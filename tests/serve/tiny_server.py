"""A tiny model behind a server of its own, on loopback, in this process: seconds, and real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import torch
import uvicorn
from openai import OpenAI

from llmkern.serve.app import create_app
from llmkern.serve.options import ServeOptions

__all__ = ["CONTEXT", "Served", "serving", "tiny_model", "tiny_tokenizer"]

CONTEXT = 512
PATIENCE = 120
"""Seconds until a test fails that waits for something: many times what it takes on a machine with other work."""
get, post = (functools.partial(ask, timeout=PATIENCE) for ask in (httpx.get, httpx.post))
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('system comes first') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def tiny_tokenizer() -> Any:
    """Bytes, an end and a padding token; every text is as many tokens as bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(seed: int = 0, **changes: Any) -> Any:
    """A random Llama of 2 layers over those tokens; its logits are far apart, so that rounding changes no token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=258, num_key_value_heads=2, max_position_embeddings=CONTEXT, eos_token_id=256, **sizes, **changes
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3
        model.lm_head.weight[256] = 0  # the end comes by length, unless a test biases it
    return model


class Served:
    """A running server: its address, its engine, and clients."""

    def __init__(self, url: str, app: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.url, self.engine, self._loop = url, app.state.engine, loop

    def client(self, **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=PATIENCE, **options)

    def wait_idle(self, seconds: float = PATIENCE) -> None:
        """Until no sequence has a place, in the server or in the worker."""
        end = time.monotonic() + seconds
        manager = getattr(self.engine, "manager", None)
        while self.engine.running or (manager is not None and manager.running + manager.waiting):
            assert time.monotonic() < end, "sequences kept their places"
            time.sleep(0.01)


@contextlib.contextmanager
def serving(model: Any, tokenizer: Any, **options: Any) -> Iterator[Served]:
    """The server in a thread."""
    checked = ServeOptions(**({"name": "tiny", "max_context": CONTEXT, "port": 0} | options))
    app = create_app(model, tokenizer, checked)
    gc.freeze()  # as `run` does
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    end = time.monotonic() + PATIENCE
    while not server.started:
        assert thread.is_alive(), "the server ended while it started"
        assert time.monotonic() < end
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Served(f"http://127.0.0.1:{port}", app, loops[0])
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server did not end"
