"""The environment variables of llmkern/config.py: a value that is not accepted is refused in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict

import pytest
import torch

from llmkern import config, ops


@pytest.fixture
def environment() -> Iterator[pytest.MonkeyPatch]:
    """Undone, and read again, after the test."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch
    config.reload()


def test_values_are_read_again(environment: pytest.MonkeyPatch) -> None:
    for name, value in (("BACKEND", "torch"), ("STRICT", "1"), ("DEBUG", ""), ("CACHE", "somewhere")):
        environment.setenv(f"LLMKERN_{name}", value)
    assert config.reload() is config.settings
    found = asdict(config.settings)
    assert [found[name] for name in ("backend", "strict", "debug", "cache")] == ["torch", True, False, "somewhere"]


@pytest.mark.parametrize("name", ["LLMKERN_STRICT", "LLMKERN_DEBUG", "LLMKERN_BATCH_INVARIANT", "LLMKERN_KEEP_PACKED"])
def test_a_flag_is_0_or_1(environment: pytest.MonkeyPatch, name: str) -> None:
    before = asdict(config.settings)
    environment.setenv("LLMKERN_CACHE", "somewhere")
    environment.setenv(name, "yes")
    with pytest.raises(ValueError, match=f"^{name} is 'yes', expected 0 or 1$"):
        config.reload()
    assert asdict(config.settings) == before


def test_after_the_import_every_call_ends_with_the_sentence_until_the_value_is_accepted() -> None:
    code = (
        "import os, torch, llmkern\n"
        "for _ in range(2):\n"
        "    try: llmkern.ops.gelu(torch.ones(2))\n"
        "    except ValueError as error: print(error)\n"
        "os.environ['LLMKERN_STRICT'] = '0'\n"
        "llmkern.config.reload()\n"
        "print(llmkern.ops.gelu(torch.zeros(2)).sum().item())"
    )
    environment = os.environ | {"LLMKERN_STRICT": "true"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout.splitlines() == [*["LLMKERN_STRICT is 'true', expected 0 or 1"] * 2, "0.0"], run.stderr


def test_an_unknown_backend_is_one_at_the_first_call(environment: pytest.MonkeyPatch) -> None:
    """Not before: a backend from outside the package is registered after llmkern has been imported."""
    environment.setenv("LLMKERN_BACKEND", "nosuch")
    config.reload()
    with pytest.raises(ValueError, match="^LLMKERN_BACKEND: unknown backend 'nosuch'; there are cuda, triton, tpu, "):
        ops.rms_norm(torch.ones(2, 3), None)
