"""The Triton backend: when it refuses and how, what compilers see of it, and gradients through it.

That its kernels are right is for the contract tests (tests/ops/test_contract.py), which run every case through Triton's
interpreter where TRITON_INTERPRET=1 is set, as `make test` does.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from llmkern import dispatch, ops
from llmkern.backends import triton as backend
from llmkern.backends.triton._launch import Kernel, launch
from llmkern.dispatch import Refused, use_backend
from llmkern.testing.case import Case, cases
from llmkern.testing.compare import as_list

ROOT = Path(__file__).parents[2]
TRITON_OPS = [op for op in dispatch.ops() if any(i.backend is backend.TRITON for i in dispatch.implementations(op))]
interpreting = pytest.mark.skipif(backend.TRITON.missing is not None, reason=str(backend.TRITON.missing))
present = pytest.mark.skipif(not backend.installed(), reason="Triton is not installed")


def python(code: str, **env: str) -> str:
    """What a fresh process prints, in which Triton compiles: without TRITON_INTERPRET."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_missing_triton_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "installed", lambda: False)
    assert backend.TRITON.probe() == "Triton is not installed; pip install triton"


def test_without_triton_nothing_imports_or_warns() -> None:
    """Every op's declaration, and `llmkern info`, as on a machine without Triton."""
    code = """
import importlib.util, sys, warnings
warnings.simplefilter("error")
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] == "triton" else find_spec(name, *a)
sys.modules["triton"] = None  # importing it raises
import torch, llmkern
from llmkern import ops
from llmkern.info import info
print(info().backends["triton"]["missing"], info().backends["triton"]["ops"])
print(ops.rms_norm(torch.ones(2, 8)).sum().item())
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert "Triton" not in run.stderr
    assert run.stdout.splitlines()[0] == f"Triton is not installed; pip install triton {len(TRITON_OPS)}"


@present
def test_an_old_triton_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.importlib.metadata, "version", lambda package: "3.5.1")
    assert backend.TRITON.probe() == "Triton 3.5.1 is too old; 3.6 or newer is needed"


@present
def test_an_interpreter_too_old_for_numpy_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    versions = {"triton": "3.6.0", "numpy": "2.4.1"}
    monkeypatch.setattr(backend.importlib.metadata, "version", versions.get)
    assert backend.TRITON.probe() == "Triton 3.6 cannot interpret with NumPy 2.4; pip install 'numpy<2.4'"
    versions["numpy"] = "2.3.5"
    assert backend.TRITON.probe() is None


@present
def test_cpu_tensors_need_the_interpreter() -> None:
    code = """
import torch
from llmkern import dispatch, ops
with dispatch.use_backend("triton"):
    try:
        ops.rms_norm(torch.ones(2, 8))
    except dispatch.Refused as refused:
        print(refused)
"""
    # Where there is a GPU the backend is there, and refuses the CPU tensor; else it is missing altogether.
    assert "TRITON_INTERPRET=1 is set" in python(code)


@interpreting
@pytest.mark.parametrize("op", TRITON_OPS)
def test_cpu_tensors_are_interpreted_only_if_asked(op: str) -> None:
    best = dispatch.implementations(op)
    order = [i.backend.name for i in best if i.devices is None or "cpu" in i.devices]
    assert order.index("triton") > order.index("reference")


@pytest.mark.parametrize(("device", "expected"), [(1, [1]), (0, []), (-1, [])])
def test_kernels_run_on_the_device_of_their_tensors(
    monkeypatch: pytest.MonkeyPatch, device: int, expected: list[int]
) -> None:
    """Triton itself launches on the current device; -1 is the CPU's, which need not have a torch with CUDA."""
    entered: list[int] = []
    current = [0]

    @contextlib.contextmanager
    def on(index: int) -> Iterator[None]:
        entered.append(index)
        current[0] = index
        yield
        current[0] = 0

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", on)
    ran_on: list[int] = []
    kernel = Kernel("nothing", "to_import")
    kernel.loaded = {(2, 1, 1): lambda *arguments, **constants: ran_on.append(current[0])}
    launch(kernel, (2, 1, 1), SimpleNamespace(get_device=lambda: device), BLOCK=1)
    assert (entered, ran_on) == (expected, [max(device, 0)])


@interpreting
def test_wide_rows_are_refused() -> None:
    with use_backend("triton"), pytest.raises(Refused, match="hidden size 16385 is larger than 16384"):
        ops.rms_norm(torch.ones(1, 16385))


@interpreting
def test_float64_is_refused() -> None:
    with use_backend("triton"), pytest.raises(Refused, match="takes float32, bfloat16, float16, not float64"):
        ops.rms_norm(torch.ones(1, 8, dtype=torch.float64))


def second(op: str, dtype: torch.dtype = torch.float32) -> Case:
    """The op's second case; the first tends to be the smallest possible, whose sizes of 1 hide mistakes."""
    return [case for case in cases(op) if case.dtype == dtype][1]


FORWARD = [op for op in TRITON_OPS if not op.endswith("_backward")]
WITH_GRADIENT = [op for op in FORWARD if second(op).differentiable]


@interpreting
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("op", WITH_GRADIENT)
def test_gradients_flow_through_its_own_operators(op: str, compiled: bool) -> None:
    case, found = second(op), []
    for name in ("triton", "reference"):
        torch._dynamo.reset()
        call = {
            k: v.requires_grad_() if k in case.differentiable and isinstance(v, Tensor) else v
            for k, v in case.make().items()
        }
        public = getattr(ops, op)
        if compiled:
            public = torch.compile(public, backend="aot_eager", fullgraph=True)
        with use_backend(name):
            outputs = [o for o in as_list(public(**call)) if o.requires_grad]
            inputs = [v for v in call.values() if isinstance(v, Tensor) and v.requires_grad]
            found.append(torch.autograd.grad([o.square().sum() for o in outputs], inputs))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@present
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compilers_see_the_kernels(dynamic: bool) -> None:
    """torch.compile traces through each operator, to calls of Triton kernels that it can place and fuse around."""
    code = """
import sys, torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from functorch.compile import make_boxed_func
without = torch.cuda.is_available
torch.cuda.is_available = lambda: True  # else no operators are made
import llmkern
torch.cuda.is_available = without
from llmkern.testing.case import cases

class Seen(Exception):
    pass

def look(graph, inputs):
    targets = {str(node.target) for node in graph.graph.nodes}
    if not any("triton_kernel_wrapper" in target for target in targets):
        raise AssertionError(f"no Triton kernel among {targets}")
    raise Seen

for op in sys.argv[1:]:
    call = [case for case in cases(op) if case.dtype == torch.float32][1].make()
    operator = getattr(torch.ops.llmkern_triton, op).default
    try:
        torch.compile(operator, fullgraph=True, dynamic=dynamic, backend=aot_autograd(fw_compiler=look))(**call)
    except Exception as error:
        if not isinstance(error.__cause__ or error, Seen) and "Seen" not in str(error):
            raise
        print(op)
"""
    argument = f"import sys; sys.argv[1:] = {FORWARD!r}; dynamic = {dynamic}\n"
    assert python(argument + code).split() == FORWARD
