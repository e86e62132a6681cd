"""Calls of a form that was served before: what is recognised, what is not, and that both give the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmkern import _form, dispatch, ops
from llmkern.testing.case import cases, ops_with_cases
from llmkern.testing.compare import assert_same_bits
from llmkern.testing.recorder import Recorder
from llmkern.why import capture


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch):
    """The forms of rms_norm, which start empty."""
    spec = dispatch.OPS["rms_norm"]
    spec.forget()
    yield lambda: spec.recent
    spec.forget()


def test_torch_can_compare_tensors() -> None:
    """This torch can; where one cannot, calls are slower and nothing else."""
    assert _form._can_compare()


@torch.no_grad()
def test_a_form_that_comes_again_is_recognised(forms) -> None:
    x, w = torch.randn(2, 8), torch.randn(8)
    first = ops.rms_norm(x, w)
    assert not forms()  # sizes that grow from call to call are never put there
    second = ops.rms_norm(x, w)
    assert len(forms()) == 1
    assert_same_bits([first, second], [ops.rms_norm(x.clone(), w.clone()), ops.rms_norm(x, w)])
    assert len(forms()) == 1


class Subclass(torch.Tensor):
    pass


@torch.no_grad()
@pytest.mark.parametrize(
    ("other", "known"),
    [
        ((torch.randn(2, 8), torch.randn(8), 1e-6), True),
        ((torch.randn(3, 8), torch.randn(8), 1e-6), False),
        ((torch.randn(8, 2).t(), torch.randn(8), 1e-6), False),
        ((torch.randn(2, 16)[:, ::2], torch.randn(8), 1e-6), False),
        ((torch.randn(2, 8).bfloat16(), torch.randn(8), 1e-6), False),
        ((torch.randn(2, 8, requires_grad=True), torch.randn(8), 1e-6), False),
        ((torch.randn(2, 8), torch.nn.Parameter(torch.randn(8)), 1e-6), False),
        ((torch.randn(2, 8).as_subclass(Subclass), torch.randn(8), 1e-6), False),
        ((torch.randn(2, 8), None, 1e-6), False),
        ((torch.randn(2, 8), torch.randn(8), 1e-5), False),
    ],
    ids=lambda value: str(value) if isinstance(value, bool) else "",
)
def test_whatever_differs_is_decided_anew(forms, other, known, monkeypatch) -> None:
    x, w, eps = torch.randn(2, 8), torch.randn(8), 1e-6
    for _ in range(2):
        ops.rms_norm(x, w, eps=eps)
    (form,) = forms()
    arguments = (other[0], other[1], None, other[2], 0.0)
    assert (form.same(*form.tensors(arguments)) and form.others(arguments) in form.known) == known
    expected = dispatch.implementation("rms_norm", "reference").fn(
        x=other[0], weight=other[1], bias=None, eps=other[2], weight_offset=0.0
    )
    torch.testing.assert_close(ops.rms_norm(other[0], other[1], eps=other[2]), expected)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_modes_and_transforms_are_not_passed_by(forms) -> None:
    x, w = torch.randn(2, 8), torch.randn(8)
    for _ in range(2):
        ops.rms_norm(x, w)
    (form,) = forms()
    assert form.same(x, w)
    with Seen():
        assert not form.same(x, w)
    within = []
    torch.func.vmap(lambda row: within.append(form.same(row, w)) or row)(torch.randn(3, 2, 8))
    assert within == [False]


@torch.no_grad()
def test_a_forced_backend_a_recorder_and_gradients_are_heeded(forms) -> None:
    x, w = torch.randn(2, 8), torch.randn(8, requires_grad=True)
    for _ in range(2):
        ops.rms_norm(x, w)
    with dispatch.use_backend("reference"), dispatch.recording(recorder := Recorder()):
        ops.rms_norm(x, w)
    assert recorder.backends == ["reference"]
    with torch.enable_grad():
        assert ops.rms_norm(x, w).requires_grad


@torch.no_grad()
def test_bad_input_has_its_sentence_after_good_input(forms) -> None:
    x, w = torch.randn(2, 8), torch.randn(8)
    for _ in range(2):
        ops.rms_norm(x, w, eps=1e-6)
    for eps in (torch.tensor(1e-6), [1e-6], "1", None):
        with pytest.raises(TypeError, match="^rms_norm: eps is .*expected"):
            ops.rms_norm(x, w, eps=eps)
    with pytest.raises(ValueError, match="^rms_norm: weight has shape"):
        ops.rms_norm(x, torch.randn(9))


@torch.no_grad()
@pytest.mark.parametrize("op", ops_with_cases())
def test_every_op_gives_the_same_when_it_is_recognised(op) -> None:
    """Public functions dispatch the arguments in the schema's order, by which native kernels are called."""
    case = next(case for case in cases(op) if case.dtype == torch.float32)
    public, spec = getattr(ops, op), dispatch.OPS[op]
    spec.forget()
    arguments = [a.name for a in getattr(torch.ops.llmkern, op).default._schema.arguments]
    assert list(capture(op, public, case.make())) == arguments
    outputs = [public(**case.make()) for _ in range(3)]
    for output in outputs[1:]:
        assert_same_bits(_tensors(output), _tensors(outputs[0]))


def _tensors(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@torch.no_grad()
def test_a_torch_without_such_guards_is_served_all_the_same(forms, monkeypatch) -> None:
    monkeypatch.setattr(_form, "_can_compare", lambda: False)
    x = torch.randn(2, 8)
    outputs = [ops.rms_norm(x) for _ in range(3)]
    assert not forms()
    assert_same_bits(outputs[1:], outputs[:1] * 2)
