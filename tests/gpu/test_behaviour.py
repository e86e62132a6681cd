"""What a GPU kernel owes besides right numbers: the same bits every time, whatever stream, graph or device it is on.

The runs of equal bits are asked of the kernels for the CPU too, which every machine has.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_calls
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from llmkern import dispatch
from llmkern.dispatch import tensors_in
from llmkern.testing.case import Call, Case, cases, ops_with_cases
from llmkern.testing.compare import as_list, assert_same_bits, cast
from llmkern.testing.judge import assert_right, written

ROOT = Path(__file__).parents[2]
OURS = ("cuda", "triton", "cpu")
RUNS = 20
INTERPRETED = 2  # runs of Triton's interpreter, which has one order of everything: it tells what is never written
SANITIZED = "rms_norm or swiglu_quant or int8_matmul or attention"
absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")


def implementations(*devices: str) -> list[Any]:
    """Return our implementations for these devices."""
    return [
        pytest.param(impl, device, id=f"{op}-{impl.backend.name}-{device}", marks=marks(device))
        for op in ops_with_cases()
        for impl in dispatch.implementations(op)
        for device in devices
        if impl.backend.name in OURS and impl.devices is not None and device in impl.devices
    ]


def marks(device: str) -> list[Any]:
    return [pytest.mark.gpu, absent] if device == "cuda" else []


def largest_case(impl: dispatch.Implementation, device: str) -> Case:
    """Return the largest case that it serves, in bf16 if there is one: the most blocks, in any order."""
    served = [c for c in cases(impl.op) if impl.why_not(**c.make(device)) is None]
    if not served:
        pytest.skip("it serves no case here")
    return max(served, key=lambda case: (case.dtype == torch.bfloat16, size(case.make("cpu"))))


def size(call: Call) -> int:
    return sum(value.numel() for value in tensors_in(call.values()))


def run(impl: dispatch.Implementation, call: Call) -> list[Tensor]:
    """Its outputs and what it writes, from a fresh copy of what it writes."""
    copies = {name: tree_map_only(Tensor, Tensor.clone, call[name]) for name in written(impl.op)}
    return [*as_list(impl.fn(**(call | copies))), *tensors_in(copies.values())]


@pytest.mark.parametrize(("impl", "device"), implementations("cuda", "cpu"))
def test_every_run_gives_the_same_bits(impl: dispatch.Implementation, device: str) -> None:
    call = largest_case(impl, device).make(device)
    first = run(impl, call)
    runs = INTERPRETED if impl.backend.name == "triton" and device == "cpu" else RUNS
    for _ in range(runs - 1):
        assert_same_bits(run(impl, call), first)


@pytest.mark.parametrize(("impl", "device"), implementations("cuda"))
def test_a_cuda_graph_replays_it_on_new_inputs(impl: dispatch.Implementation, device: str) -> None:
    call = largest_case(impl, device).make(device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(impl, call)  # compiles what has to be, and sets kernels' attributes
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(impl, call)
    lead = next(value for value in call.values() if isinstance(value, Tensor))
    lead.copy_(lead.flip(0))
    expected = run(impl, call)
    for output in captured:
        output.zero_()
    graph.replay()
    assert_same_bits(captured, expected)


@pytest.mark.parametrize(("impl", "device"), implementations("cuda"))
def test_it_runs_on_the_current_stream(impl: dispatch.Implementation, device: str) -> None:
    """Inputs that arrive late on a stream of their own are waited for, by nothing but that stream."""
    call = largest_case(impl, device).make(device)
    expected = run(impl, call)
    lead = next(name for name, value in call.items() if isinstance(value, Tensor))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        late = torch.zeros_like(call[lead])
        torch.cuda._sleep(50_000_000)  # cycles
        late.copy_(call[lead])
        out = run(impl, call | {lead: late})
    torch.cuda.synchronize()
    assert_same_bits(out, expected)


@pytest.mark.parametrize(("impl", "device"), implementations("cuda"))
def test_the_second_device_serves_its_own_tensors(impl: dispatch.Implementation, device: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    case = largest_case(impl, device)
    call = case.make("cuda:1")
    out = impl.fn(**call)
    assert all(output.device == torch.device("cuda:1") for output in as_list(out))
    assert_right(case, call, out)


def differentiable() -> list[Any]:
    return [
        pytest.param(case, backend, id=f"{op}-{backend}", marks=marks("cuda"))
        for op in ops_with_cases()
        for case in [c for c in cases(op) if c.differentiable][-1:]
        for backend in ("cuda", "triton")
    ]


@pytest.mark.parametrize(("case", "backend"), differentiable())
def test_every_gradient_has_the_same_bits(case: Case, backend: str) -> None:
    call = case.make("cuda")
    call |= {name: cast(call[name], torch.bfloat16) for name in case.differentiable}
    inputs = [call[name].requires_grad_() for name in case.differentiable if isinstance(call[name], Tensor)]
    with dispatch.use_backend(backend):
        try:
            found = [gradients(case, call, inputs) for _ in range(RUNS)]
        except dispatch.Refused as refused:
            pytest.skip(str(refused))
    for later in found[1:]:
        assert_same_bits(later, found[0])


def gradients(case: Case, call: Call, inputs: list[Tensor]) -> list[Tensor]:
    outputs = [o for o in as_list(getattr(torch.ops.llmkern, case.op)(**call)) if o.requires_grad]
    return list(torch.autograd.grad([o.float().square().sum() for o in outputs], inputs))


def sanitized(tool: str, command: list[str]) -> None:
    """Runs a command under a tool of compute-sanitizer, which is to find nothing."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    checked = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "99", sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert checked.returncode == 0, checked.stdout[-4000:]


@pytest.mark.gpu
@absent
def test_memcheck_finds_nothing() -> None:
    """No access out of bounds in a sample of the contract's cases."""
    contract = str(ROOT / "tests" / "ops" / "test_contract.py")
    sanitized("memcheck", ["-m", "pytest", "-x", "-m", "gpu", contract, "-k", f"cuda and bf16 and ({SANITIZED})"])


@pytest.mark.gpu
@absent
@pytest.mark.parametrize("tool", ["racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    """On hardware what csrc/simt proves on a CPU, once, of kernels with shared memory, barriers and copies."""
    sanitized(tool, [str(ROOT / "tests" / "gpu" / "tiny_calls.py"), "cuda"])


def test_the_tiny_calls_are_calls() -> None:
    """Which no machine without a GPU would otherwise run."""
    assert sorted(tiny_calls.run("cpu")) == sorted(tiny_calls.OPS)


@pytest.mark.gpu
@absent
def test_a_tensor_that_is_not_on_the_gpu_is_refused() -> None:
    """By the operators themselves: a kernel that reads it would end the process's context."""
    x, weight = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((4, 64), (64,)))
    q = torch.randn(1, 1, 4, 64, device="cuda", dtype=torch.bfloat16)
    options = {"attn_mask": None, "key_padding_mask": None, "sinks": None, "causal": False, "sm_scale": 1.0}
    options |= {"window": [-1, -1], "softcap": 0.0, "return_lse": False}
    others = ["cpu"] + ["cuda:1"] * (torch.cuda.device_count() > 1)
    for other in others:
        with pytest.raises(RuntimeError, match="dy must have the shape, dtype and device of x"):
            torch.ops.llmkern.layer_norm_backward(x.to(other), x, weight, None, 1e-6)
        with pytest.raises(RuntimeError, match="k must be on q's device"):
            torch.ops.llmkern.attention(q=q, k=q.to(other), v=q, **options)
