"""How a forward computes what it computes: the operators between its parts, and the decisions in its source.

A probe compares values, on a few small inputs.  What begins elsewhere (a scale that grows with the position, a branch
for long inputs, another formula in half precision) has the same values there, but not the same operators, or it has a
comparison in its source.  Both are looked at here.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

__all__ = ["Between", "Sources", "aside", "settled", "why_undecided"]

# Views of a tensor, and copies of one that compute nothing.
_MOVES = frozenset(
    ("_reshape_alias", "_unsafe_view", "alias", "cat", "chunk", "clone", "detach", "expand", "permute", "reshape")
    + ("select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten")
    + ("unsqueeze", "view")
)
# Whose functions go by what is no part of a model: flags, versions, names of attributes.
_LIBRARIES = (
    *("torch", "llmkern", "transformers.configuration_utils", "transformers.modeling_layers"),
    *("transformers.pytorch_utils", "transformers.utils"),
)
_COUNTS = frozenset({"abs", "all", "any", "bool", "divmod", "float", "int", "len", "max", "min", "round", "sum"})


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """The setting that probes run in, whatever the caller's is: fp32, the CPU, no autocast, no modes, no gradients;
    and tensors made here can be trained (those of inference mode never can)."""
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_disable_current_modes())
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, dtype=torch.bfloat16, enabled=False))
        if torch.get_default_device().type != "cpu":  # it costs something at every function
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def aside(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as a part, into which `Sources` and `Between` do not look."""

    @functools.wraps(function)
    def unseen(*args: Any, **kwargs: Any) -> Any:
        before = sys.gettrace()
        sys.settrace(None)
        try:
            with _disable_current_modes():
                return function(*args, **kwargs)
        finally:
            sys.settrace(before)

    return unseen


class Sources:
    """Notes which functions run within the block; `reason` says where one of them goes by what a probe cannot see
    through, and is "" where none does."""

    def __init__(self) -> None:
        self._codes: dict[types.CodeType, None] = {}

    def __enter__(self) -> Sources:
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    @property
    def reason(self) -> str:
        return next(filter(None, map(why_undecided, self._codes)), "")

    def _called(self, frame: types.FrameType, event: str, _: Any) -> None:
        if event == "call" and not _is_of_a_library(str(frame.f_globals.get("__name__", ""))):
            self._codes[frame.f_code] = None


class Between(TorchDispatchMode):
    """Looks at the operators within the block, but for those of parts (`aside`); `reason` says what is more than to add
    tensors and to move them, "" where nothing is."""

    def __init__(self) -> None:
        super().__init__()
        self.reason = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        operands = args[:2]
        adds = name == "add" and all(isinstance(x, Tensor) for x in operands) and not kwargs
        scales_by_one = name == "mul" and any(not isinstance(x, Tensor) and x == 1 for x in operands)
        if name not in _MOVES and not adds and not scales_by_one and not self.reason:
            self.reason = f"between its parts its forward computes {name}"
        return func(*args, **(kwargs or {}))


def _is_of_a_library(module: str) -> bool:
    if module.partition(".")[0] in sys.stdlib_module_names or ".configuration_" in module:
        return True
    return any(module == library or module.startswith(f"{library}.") for library in _LIBRARIES)


@functools.cache
def why_undecided(code: types.CodeType) -> str | None:
    """The sentence why a probe does not tell what the function computes elsewhere; None where its source decides
    nothing by what it is given but whether something is there."""
    if code.co_name in ("<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>"):  # part of the function's own source
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError):
        return f"{code.co_name} has no source in which to look for branches"
    except SyntaxError:  # of a lambda there are only the lines that it stands in
        return None
    for node in ast.walk(tree):
        found = _decision(node)
        if found is not None:
            return f"{code.co_name} goes by `{ast.unparse(found)}`, which a probe cannot see through"
    return None


def _decision(node: ast.AST) -> ast.AST | None:
    """The expression by which this node does one thing or another, going by sizes or contents."""
    if isinstance(node, ast.Compare):
        presence = all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops)
        operands = (node.left, *node.comparators)
        return None if presence or all(map(_is_fixed, operands)) or _is_own_dtype(*operands) else node
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.FloorDiv, ast.Mod)):
        return None if _is_fixed(node.left) and _is_fixed(node.right) else node
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _COUNTS:
        return None if all(map(_is_fixed, node.args)) else node
    if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert)):
        return _undecided(node.test)
    if isinstance(node, ast.BoolOp):
        return next(filter(None, map(_undecided, node.values[:-1])), None)
    return None


def _undecided(test: ast.expr) -> ast.expr | None:
    """The part of a condition that may depend on contents; comparisons are looked at by themselves."""
    if isinstance(test, ast.BoolOp):
        return next(filter(None, map(_undecided, test.values)), None)
    if isinstance(test, ast.UnaryOp):
        return _undecided(test.operand)
    if isinstance(test, ast.Call):
        asks = isinstance(test.func, ast.Name) and test.func.id in ("isinstance", "hasattr", "getattr", "callable")
        return None if asks or _is_fixed(test) else test
    if isinstance(test, (ast.Compare, ast.Name)) or _is_fixed(test):
        return None
    return test


def _is_fixed(node: ast.expr) -> bool:
    """Whether the value is the module's own, a constant, or the width of a tensor: the same in every call."""
    if isinstance(node, ast.Constant):
        return True
    if isinstance(node, (ast.Tuple, ast.List)):
        return all(map(_is_fixed, node.elts))
    if isinstance(node, ast.UnaryOp):
        return _is_fixed(node.operand)
    if isinstance(node, ast.BinOp):
        return _is_fixed(node.left) and _is_fixed(node.right)
    if isinstance(node, ast.Subscript):
        width = isinstance(node.value, ast.Attribute) and node.value.attr == "shape" and _is_last(node.slice)
        return width or (_is_fixed(node.value) and _is_fixed(node.slice))
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr == "size" and len(node.args) == 1:
            return _is_last(node.args[0])
        return _is_fixed(node.func) and all(map(_is_fixed, node.args)) and not node.keywords
    if isinstance(node, ast.Attribute):
        return _is_fixed(node.value) or (isinstance(node.value, ast.Name) and node.value.id in ("self", "torch"))
    return False


def _is_own_dtype(*operands: ast.expr) -> bool:
    """Whether a tensor's dtype is compared with that of the module's weights: ours serves them where all are one."""
    dtypes = [operand for operand in operands if isinstance(operand, ast.Attribute) and operand.attr == "dtype"]
    return len(dtypes) == len(operands) and any(ast.unparse(dtype).startswith("self.") for dtype in dtypes)


def _is_last(index: ast.expr) -> bool:
    return ast.unparse(index) == "-1"
