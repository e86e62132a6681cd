"""What every op and every implementation owes, over the op's cases: accuracy, opcheck, gradients, compile, export."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from llmkern import dispatch, ops
from llmkern.testing.case import Call, Case, cases, ops_with_cases
from llmkern.testing.compare import as_list, assert_same_bits, cast, upcast
from llmkern.testing.judge import Judge, assert_accurate, assert_right, reference, written
from llmkern.testing.recorder import Recorder

OPS = ops_with_cases()
ALL_CASES = [case for op in OPS for case in cases(op)]
CASES_WITH_GRADIENT = [case for case in ALL_CASES if case.differentiable]
FP32_CASES = [case for case in ALL_CASES if case.dtype == torch.float32]
HAS_GPU = torch.cuda.is_available()


def case_id(case: Case) -> str:
    return f"{case.op}-{case}"


def pairs() -> list:
    """Each case by each implementation, on the devices at hand that it is written for."""
    found = []
    for case in ALL_CASES:
        for impl in dispatch.implementations(case.op):
            name = f"{case_id(case)}-{impl.backend.name}"
            if impl.devices is None or "cpu" in impl.devices:
                found.append(pytest.param(case, impl, "cpu", id=name))
            if HAS_GPU and impl.devices is not None and "cuda" in impl.devices:
                found.append(pytest.param(case, impl, "cuda", id=f"{name}-gpu", marks=pytest.mark.gpu))
    return found


def second_of_each_op(candidates: list[Case]) -> list[Case]:
    """The first tends to be the smallest possible, whose sizes of 1 hide mistakes."""
    return [[case for case in candidates if case.op == op][1] for op in OPS]


def tensors(call: Call) -> dict[str, Tensor]:
    return {name: value for name, value in call.items() if isinstance(value, Tensor)}


def all_tensors(call: Call) -> dict[str, Tensor]:
    """Those in lists too, by the names of the lists and their places."""
    lists = {
        f"{name}[{i}]": each
        for name, value in call.items()
        if isinstance(value, list)
        for i, each in enumerate(value)
        if isinstance(each, Tensor)
    }
    return tensors(call) | lists


def require_grad(case: Case, call: Call) -> Call:
    return {
        k: v.detach().clone().requires_grad_() if k in case.differentiable and isinstance(v, Tensor) else v
        for k, v in call.items()
    }


def gradients(outputs: list[Tensor], call: Call) -> list[Tensor]:
    """Return gradients for fixed random weights of the outputs, in the order of the arguments that need one."""
    outputs = [o for o in outputs if o.requires_grad]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(o.shape, generator=generator, dtype=o.dtype).to(o.device) for o in outputs]
    return list(torch.autograd.grad(outputs, [v for v in tensors(call).values() if v.requires_grad], weights))


@functools.lru_cache(maxsize=2)  # tests of a case by several implementations follow each other
def judge_of(case: Case, device: str) -> tuple[Judge, list[Tensor]]:
    """The judge of a case's results, and what the op's fake makes of the call: the outputs' shapes and strides as
    torch.compile relies on them."""
    judge = Judge(case, case.make(device))
    with FakeTensorMode() as mode:
        faked = tree_map_only(Tensor, mode.from_tensor, judge.call)
        return judge, as_list(getattr(torch.ops.llmkern, case.op)(**faked))


def layout(tensor: Tensor) -> list[int]:
    """The strides that place elements: those of dimensions of size 1, and of empty tensors, do not."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1 and tensor.numel()]


@pytest.mark.parametrize(("case", "impl", "device"), pairs())
def test_implementation(case: Case, impl: dispatch.Implementation, device: str) -> None:
    """Right by the case's rule; inputs untouched but for those that the op writes; outputs laid out as the op's fake
    says, and no view of an input."""
    call = case.make(device)
    with dispatch.use_backend(impl.backend.name):  # some serve only where they are asked for
        reason = impl.why_not(**call)
    if reason is not None:
        pytest.skip(reason)  # the dispatcher's own words
    judge, fakes = judge_of(case, device)
    out = impl.fn(**call)
    judge.assert_right(call, out)
    kept = [name for name in all_tensors(call) if name.partition("[")[0] not in written(case.op)]
    now, before = all_tensors(call), all_tensors(judge.call)
    assert_same_bits([now[name] for name in kept], [before[name] for name in kept])
    storages = {value.untyped_storage().data_ptr() for value in now.values() if value.numel()}
    for i, (output, fake) in enumerate(zip(as_list(out), fakes, strict=True)):
        assert output.shape == fake.shape
        assert layout(output) == layout(fake), f"output {i} has strides {output.stride()}, the op's are {fake.stride()}"
        assert output.numel() == 0 or output.untyped_storage().data_ptr() not in storages, f"output {i} is an input"


@pytest.mark.parametrize("case", FP32_CASES, ids=case_id)
def test_opcheck(case: Case) -> None:
    call = case.make()
    if any(bool(value.isnan().any()) for value in all_tensors(call).values()):
        pytest.skip("opcheck compares outputs with equal_nan=False")
    operator = getattr(torch.ops.llmkern, case.op).default
    alone, traced = ("test_schema", "test_faketensor"), ("test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, (), call, test_utils=alone)
    # The trace with gradients is of the forward too, and takes nearly all of the time.
    torch.library.opcheck(operator, (), require_grad(case, call) if case.differentiable else call, test_utils=traced)


@pytest.mark.parametrize("case", CASES_WITH_GRADIENT, ids=case_id)
def test_gradients_match_autograd_of_the_reference_in_float64(case: Case) -> None:
    """The operator's autograd on the formulas of the reference, against autograd through the reference's forward."""
    call = upcast(case.make())
    ours, theirs = require_grad(case, call), require_grad(case, call)
    out = getattr(torch.ops.llmkern, case.op)(**ours)
    expected = gradients(as_list(reference(case.op, theirs)), theirs)
    with dispatch.use_backend("reference"):
        for got, want in zip(gradients(as_list(out), ours), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES_WITH_GRADIENT, ids=case_id)
def test_gradients_of_gradients_match_the_reference_in_float64(case: Case) -> None:
    if case.op in ("linear_cross_entropy", "linear_jsd", "linear_kl_div"):
        pytest.skip("its gradient cannot be differentiated again, and says so")
    ours, theirs = require_grad(case, upcast(case.make())), require_grad(case, upcast(case.make()))

    def second(out: Any, call: Call) -> list[Tensor]:
        weights = [
            torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=value.dtype) for value in out
        ]
        wanted = [value for value in tensors(call).values() if value.requires_grad]
        first = torch.autograd.grad(out, wanted, weights, create_graph=True)
        curved = [each.square().sum() for each in first if each.requires_grad]
        again = torch.autograd.grad(curved, wanted, allow_unused=True) if curved else [None] * len(wanted)
        return [torch.zeros_like(w) if each is None else each for w, each in zip(wanted, again, strict=True)]

    out = [o for o in as_list(getattr(torch.ops.llmkern, case.op)(**ours)) if o.requires_grad]
    expected = [o for o in as_list(reference(case.op, theirs)) if o.requires_grad]
    for got, want in zip(second(out, ours), second(expected, theirs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7, equal_nan=True)


def backward_calls() -> list:
    """Each case that has gradients, on the CPU and on a GPU; there in bf16 too, which not all have a case for."""
    found = []
    for case in CASES_WITH_GRADIENT:
        found.append(pytest.param(case, case.dtype, "cpu", id=case_id(case)))
        dtypes = (case.dtype, torch.bfloat16 if case.dtype == torch.float32 else case.dtype) if HAS_GPU else ()
        for dtype in dict.fromkeys(dtypes):
            found.append(pytest.param(case, dtype, "cuda", id=f"{case_id(case)}-{dtype}-gpu", marks=pytest.mark.gpu))
    return found


@pytest.mark.parametrize(("case", "dtype", "device"), backward_calls())
def test_implementations_of_the_backward(case: Case, dtype: torch.dtype, device: str) -> None:
    """Whatever ops the gradient asks for, each of their implementations keeps the accuracy rule."""
    call = case.make(device)
    for name in case.differentiable:
        call[name] = cast(call[name], dtype)
    call, recorder = require_grad(case, call), Recorder()
    out = getattr(torch.ops.llmkern, case.op)(**call)
    with dispatch.recording(recorder):
        gradients(as_list(out), call)
    assert recorder.calls or f"{case.op}_backward" not in dispatch.ops()  # a gradient may be plain torch
    for op, recorded in recorder.calls:
        asked = {k: v.detach() if isinstance(v, Tensor) else v for k, v in recorded.items()}
        for impl in dispatch.implementations(op):
            if impl.why_not(**asked) is None:
                out = impl.fn(**asked)
                names = [f"{op} on {impl.backend.name}, output {i}" for i in range(len(as_list(out)))]
                assert_accurate(op, asked, out, names)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", second_of_each_op(FP32_CASES), ids=case_id)
def test_compiles_without_a_graph_break(case: Case, dynamic: bool) -> None:
    """The public function, whose keyword arguments are named as the schema's."""
    torch._dynamo.reset()
    public = getattr(ops, case.op)
    compiled = torch.compile(lambda call: public(**call), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    call = case.make()
    if dynamic:  # where sizes are open, another backend may serve than at these sizes
        out = as_list(compiled(call))
        # The public function leaves out what nobody asked for.
        assert_right(case, call, out + as_list(getattr(torch.ops.llmkern, case.op)(**call))[len(out) :])
    else:
        assert_same_bits(compiled(call), public(**call))
    if case.differentiable:
        ours, theirs = require_grad(case, call), require_grad(case, call)
        for got, want in zip(
            gradients(as_list(compiled(ours)), ours), gradients(as_list(public(**theirs)), theirs), strict=True
        ):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("case", second_of_each_op(FP32_CASES), ids=case_id)
def test_exports(case: Case) -> None:
    call = case.make()
    inputs = tensors(call)

    class Module(torch.nn.Module):
        def forward(self, **given: Tensor):
            return getattr(ops, case.op)(**(call | given))

    program = torch.export.export(Module(), (), inputs)
    assert_same_bits(program.module()(**inputs), Module()(**inputs))


@pytest.mark.parametrize("op", ops.__all__)
def test_an_argument_that_is_none_or_no_number_is_named(op: str) -> None:
    call = next(c for c in cases(op) if c.dtype == torch.float32).make()
    for argument in getattr(torch.ops.llmkern, op).default._schema.arguments:
        wrong: tuple[Any, ...] = ()
        if str(argument.type) == "Tensor":
            wrong = (
                ([1.0],)
                if inspect.signature(getattr(ops, op)).parameters[argument.name].default is None
                else (None, [1.0])
            )
        elif str(argument.type) == "float":
            wrong = ("1", [1.0], torch.ones(2))
        for value in wrong:
            with pytest.raises(TypeError, match=f"^{op}: {argument.name} is .*expected"):
                getattr(ops, op)(**{**call, argument.name: value})
