"""The CUDA backend's own judgement, where there is no GPU: what it refuses, and the sentence why it is missing."""

from __future__ import annotations

import types

import pytest
import torch

from llmkern import _native, dispatch
from llmkern.backends import cuda
from llmkern.why import why


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the library had its CUDA part, and torch found a GPU."""
    monkeypatch.setattr(_native, "part_missing", lambda part: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


def library(monkeypatch: pytest.MonkeyPatch, error: bytes) -> list[int]:
    """A library whose probe finds `error`; returns the devices that it was asked for."""
    asked: list[int] = []

    def probe(device: int) -> bytes:
        asked.append(device)
        return error

    monkeypatch.setattr(_native, "_library", types.SimpleNamespace(llmkern_cuda_error=probe))
    monkeypatch.setattr(_native, "build_info", lambda: {"cuda_archs": "80;90a"})
    return asked


def test_it_is_there_with_a_gpu_that_takes_the_kernels(a_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = library(monkeypatch, b"")
    assert cuda._missing() is None
    assert asked == [1]


def test_a_driver_or_gpu_without_an_image_is_a_sentence(a_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, b"no kernel image is available for execution on the device")
    assert cuda._missing() == (
        "the CUDA kernels, built for 80;90a, cannot run here: no kernel image is available for execution on the "
        "device; a newer driver, or a build here, would help"
    )


def test_amd_gpus_are_left_to_others(a_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm's torch calls its GPUs cuda devices, of a capability beyond 8.0."""
    library(monkeypatch, b"")
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    assert cuda._missing() == "this torch is for AMD GPUs, and these kernels are for NVIDIA's"


@pytest.mark.parametrize(
    "op",
    [
        "quantize_int8",
        "swiglu_quant",
        "rms_norm",
        "layer_norm",
        "add_rms_norm_quant",
        "rms_norm_quant",
        "add_layer_norm",
    ],
)
def test_rows_that_threads_cannot_count_are_refused(op: str) -> None:
    for hidden, refused in ((2**30, False), (2**30 + 8, True), (2**31, True)):
        row = next(
            row
            for row in why(op, (2, hidden), dtype=torch.bfloat16, device="cuda", capability=(8, 0)).rows
            if row.backend == "cuda"
        )
        assert row.reason.endswith(f"has rows of {hidden} elements; at most 1073741824 are taken") == refused
        assert (row.outcome == "refused") == refused


@pytest.mark.parametrize("op", ["attention", "attention_decode"])
def test_what_is_copied_is_said(op: str) -> None:
    copies = dispatch.implementation(op, "cuda").copies
    assert copies is not None
    names = ("q", "k", "v") if op == "attention" else ("q", "k_cache", "v_cache")
    call = {name: torch.zeros(1, 1, 4, 16, dtype=torch.float16) for name in names}
    assert copies(**call) is None
    call[names[1]] = torch.zeros(4 * 16 + 3, dtype=torch.float16)[3:].view(1, 1, 4, 16)
    assert copies(**call) == f"{names[1]} begins 6 bytes past a multiple of 16, so the kernel computes with a copy"
