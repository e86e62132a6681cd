"""The tiny server that most tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("openai", reason="the extra serve is not installed")

from openai import OpenAI
from tiny_server import Served, serving, tiny_model, tiny_tokenizer

import llmkern


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def served(tokenizer: Any) -> Iterator[Served]:
    """An optimized model, 4 at a time."""
    model = tiny_model()
    llmkern.optimize_(model)
    with serving(model, tokenizer, max_concurrent=4, max_queue=60) as server:
        yield server


@pytest.fixture
def client(served: Served) -> OpenAI:
    return served.client()


@pytest.fixture(scope="session")
def one_by_one(served: Served, tokenizer: Any) -> Callable[..., list[int]]:
    """What `generate` of an untouched twin gives, token by token."""
    twin = tiny_model()

    def generate(ids: list[int], tokens: int) -> list[int]:
        with torch.no_grad():
            out = twin.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, pad_token_id=257)
        return out[0, len(ids) :].tolist()

    return generate


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray cluster of this machine, to which this process is connected; its address."""
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("HF_HUB_OFFLINE", "1")
        # What tests hand over is imported by the workers.
        paths = [str(Path(__file__).parent), str(Path(llmkern.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        ray.init(
            num_cpus=4,  # more than most machines of CI have; nothing of the tests computes for long
            include_dashboard=False,
            object_store_memory=128 << 20,
            log_to_driver=False,
            logging_level="ERROR",
            _node_ip_address="127.0.0.1",
        )
        try:
            yield ray.get_runtime_context().gcs_address
        finally:
            ray.shutdown()
