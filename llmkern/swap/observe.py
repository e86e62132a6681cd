"""Find decisions in a forward's source that a numeric probe cannot see.

A probe compares values, on a few small inputs.  What begins elsewhere (a branch for long inputs, another formula in
half precision) has the same values there, but a comparison in its source, for which is looked here; the operators of
a layer are looked at where its program is read (llmkern/swap/record.py).
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
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["Sources", "aside", "settled", "why_undecided"]

# Packages whose functions branch on flags, versions and names of attributes, which are no part of a model.
_LIBRARIES = (
    *("torch", "llmkern", "transformers.configuration_utils", "transformers.modeling_layers"),
    *("transformers.pytorch_utils", "transformers.utils"),
)
_COUNTS = frozenset({"abs", "all", "any", "bool", "divmod", "float", "int", "len", "max", "min", "round", "sum"})


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Run the block under fixed settings, whatever the caller's: fp32, CPU, no autocast, no modes, no gradients;
    tensors made here can be trained (those made under inference mode never can).
    """
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
    """Mark `function` as a part whose source `Sources` does not inspect."""

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
    """Record which functions run within the block; `reason` says where one of them depends on something that a probe
    cannot see, and is "" if none does.

    probed: look at what has run, not at branches that were not taken, and let it go by dtypes, by numbers of dimensions
        and by quotients without a rest: for who probes all that matters, in all dtypes, of which this is one, and with
        sizes that have no divisors in common.  `goes_by_dtype` says whether it goes by dtypes.
    every_index: let loops compare their variable with what is fixed: for who probes all its values.
    beyond_autocast: let functions ask whether autocast is on: for who leaves the call where it is."""

    def __init__(
        self, probed: torch.dtype | None = None, every_index: bool = False, beyond_autocast: bool = False
    ) -> None:
        self._lines: dict[types.CodeType, set[int]] = {}
        self._inexact: dict[types.CodeType, set[int]] = {}
        self._probed = probed
        self._lets = {"every_index": every_index, "beyond_autocast": beyond_autocast}

    def __enter__(self) -> Sources:
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    @property
    def reason(self) -> str:
        if self._probed is None:
            return next(filter(None, [why_undecided(c, **self._lets) for c in self._lines]), "")
        ran = {code: frozenset(lines) for code, lines in self._lines.items()}
        inexact = {code: frozenset(lines) for code, lines in self._inexact.items()}
        dtype = str(self._probed)
        return next(filter(None, [why_undecided(c, ran[c], inexact.get(c, frozenset()), dtype) for c in ran]), "")

    @property
    def goes_by_dtype(self) -> bool:
        return any(_mentions_dtypes(code) for code in self._lines)

    def _called(self, frame: types.FrameType, event: str, _: Any) -> Any:
        if event != "call" or _is_of_a_library(str(frame.f_globals.get("__name__", ""))):
            return None
        lines = self._lines.setdefault(frame.f_code, set())
        divisions = {} if self._probed is None else _divisions(frame.f_code)

        def ran(frame: types.FrameType, event: str, _: Any) -> Any:
            lines.add(frame.f_lineno)
            if event == "line" and frame.f_lineno in divisions and not _divides(divisions[frame.f_lineno], frame):
                self._inexact.setdefault(frame.f_code, set()).add(frame.f_lineno)
            return ran

        return None if self._probed is None else ran


def _is_of_a_library(module: str) -> bool:
    if module.partition(".")[0] in sys.stdlib_module_names or ".configuration_" in module:
        return True
    if module.startswith("namedtuple_"):  # the constructor of one
        return True
    return any(module == library or module.startswith(f"{library}.") for library in _LIBRARIES)


@functools.cache
def why_undecided(
    code: types.CodeType,
    ran: frozenset[int] | None = None,
    inexact: frozenset[int] = frozenset(),
    dtype: str = "",
    every_index: bool = False,
    beyond_autocast: bool = False,
) -> str | None:
    """Return why a probe does not determine what the function computes on other inputs, or None if its source decides
    only by whether an argument is present.

    ran, inexact: as for `Sources`, the lines that have run, and those in which something was divided with a rest.
    dtype: the one that was probed.  every_index, beyond_autocast: as for `Sources`."""
    if code.co_name in ("<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>"):  # part of the function's own source
        return None
    tree = _tree(code)
    if isinstance(tree, str):
        return tree
    above = code.co_firstlineno - 1
    indices = _loop_variables(tree) if every_index and tree is not None else frozenset()
    for node in [] if tree is None else _visited(tree, above, ran, dtype):
        if isinstance(node, ast.Compare) and _is_index_of(node, indices):
            continue
        divides = ran is not None and isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv)
        if divides and getattr(node, "lineno", 0) + above not in inexact:
            continue
        found = _decision(node)
        if found is not None and not (beyond_autocast and _asks_for_autocast(found)):
            return f"{code.co_name} goes by `{ast.unparse(found)}`, which a probe cannot see through"
    return None


@functools.cache
def _tree(code: types.CodeType) -> ast.AST | str | None:
    """Return the function's syntax tree, a sentence why there is no source, or None for a lambda, of which only the
    lines around it are known.
    """
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError):
        return f"{code.co_name} has no source in which to look for branches"
    except SyntaxError:
        return None


@functools.cache
def _mentions_dtypes(code: types.CodeType) -> bool:
    tree = _tree(code)
    return isinstance(tree, ast.AST) and any(map(_compares_dtype, ast.walk(tree)))


def _visited(node: ast.AST, above: int, ran: frozenset[int] | None, dtype: str) -> Iterator[ast.AST]:
    """Yield the node and everything below it.  Skips how attention's is_causal flag is made (a probe sees its effect
    with and without a mask, and a single query has none) and, if the executed lines are known, what `Sources` leaves
    out.

    above: lines of the file above the source."""
    if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["is_causal"]:
        return
    if ran is not None and (_is_for_dtypes(node, dtype) or _asks_for_dimensions(node) or _asks_for_one_device(node)):
        return
    left_out: list[ast.stmt] = []
    if ran is not None and isinstance(node, ast.If):
        for branch in (node.body, node.orelse):
            if not any(
                line + above in ran for each in branch for line in range(each.lineno, (each.end_lineno or 0) + 1)
            ):
                left_out += branch
    if ran is None or not (isinstance(node, (ast.If, ast.IfExp)) and _is_for_dtypes(node.test, dtype)):
        yield node
    for child in ast.iter_child_nodes(node):
        if child not in left_out:
            yield from _visited(child, above, ran, dtype)


def _loop_variables(tree: ast.AST) -> frozenset[str]:
    """Return the variables of loops that are assigned nothing in them but an element of their own."""
    found = {
        node.target.id for node in ast.walk(tree) if isinstance(node, ast.For) and isinstance(node.target, ast.Name)
    }
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.NamedExpr)):
            targets = [node.target]
        for name in [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]:
            value = node.value if isinstance(node, ast.Assign) else None
            own = (
                isinstance(value, ast.Subscript)
                and isinstance(value.slice, ast.Constant)
                and _is_name(value.value, name)
            )
            found -= set() if own else {name}
    return frozenset(found)


def _is_index_of(node: ast.Compare, indices: frozenset[str]) -> bool:
    left, right = node.left, node.comparators[0]
    named = isinstance(left, ast.Name) and left.id in indices
    return named and len(node.comparators) == 1 and isinstance(node.ops[0], (ast.Eq, ast.NotEq)) and _is_fixed(right)


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _asks_for_autocast(test: ast.AST) -> bool:
    test = test.operand if isinstance(test, ast.UnaryOp) else test
    return isinstance(test, ast.Call) and ast.unparse(test.func) == "torch.is_autocast_enabled"


def _is_for_dtypes(node: ast.AST, dtype: str) -> bool:
    """Return True if an expression compares a dtype with one that it names, or continues only for a dtype other than
    `dtype`.
    """
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        first = node.values[0]
        equal = isinstance(first, ast.Compare) and isinstance(first.ops[0], ast.Eq)
        return equal and _compares_dtype(first) and ast.unparse(first.comparators[0]) != dtype  # type: ignore[attr-defined]
    return _compares_dtype(node)


def _compares_dtype(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Compare)
        and ast.unparse(node.left).endswith("dtype")
        and all(ast.unparse(other).startswith("torch.") for other in node.comparators)
    )


def _asks_for_dimensions(node: ast.AST) -> bool:
    """Return True if an expression compares a tensor's number of dimensions with a number."""
    if not isinstance(node, ast.Compare) or not all(isinstance(other, ast.Constant) for other in node.comparators):
        return False
    left = ast.unparse(node.left)
    return (left.startswith("len(") and left.endswith(".shape)")) or left.endswith((".dim()", ".ndim"))


def _asks_for_one_device(node: ast.AST) -> bool:
    """Return True if an expression compares the devices of two tensors; all of a layer's inputs are on one."""
    if not isinstance(node, ast.Compare):
        return False
    return all(ast.unparse(side).endswith(".device") for side in (node.left, *node.comparators))


@functools.cache
def _divisions(code: types.CodeType) -> dict[int, list[types.CodeType]]:
    """Return the remainders of its floor divisions, by line."""
    tree = _tree(code)
    found: dict[int, list[types.CodeType]] = {}
    for node in ast.walk(tree) if isinstance(tree, ast.AST) else ():
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv):
            rest = compile(f"({ast.unparse(node.left)}) % ({ast.unparse(node.right)})", "<rest>", "eval")
            found.setdefault(node.lineno + code.co_firstlineno - 1, []).append(rest)
    return found


def _divides(rests: list[types.CodeType], frame: types.FrameType) -> bool:
    try:
        return all(eval(rest, frame.f_globals, dict(frame.f_locals)) == 0 for rest in rests)
    except Exception:  # a name that the line itself makes
        return False


def _decision(node: ast.AST) -> ast.AST | None:
    """Return the expression by which this node takes one way or another depending on sizes or contents."""
    if isinstance(node, ast.Compare):
        presence = all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops)
        operands = (node.left, *node.comparators)
        return None if presence or all(map(_is_fixed, operands)) or _is_own_dtype(*operands) else node
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.FloorDiv, ast.Mod)):
        return None if _is_fixed(node.left) and _is_fixed(node.right) else node
    if isinstance(node, ast.Call) and _counts(node.func):
        return None if all(map(_is_fixed, node.args)) else node
    if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert)):
        return _undecided(node.test)
    if isinstance(node, ast.BoolOp):
        return next(filter(None, map(_undecided, node.values[:-1])), None)
    return None


def _counts(function: ast.expr) -> bool:
    """Return True for functions of numbers that may have steps: those of math and numpy, and counting built-ins."""
    if isinstance(function, ast.Attribute):
        return isinstance(function.value, ast.Name) and function.value.id in ("math", "np", "numpy")
    return isinstance(function, ast.Name) and function.id in _COUNTS


def _undecided(test: ast.expr) -> ast.expr | None:
    """Return the part of a condition that may depend on contents; comparisons are checked separately."""
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
    """Return True if the value is the same in every call: the module's own, a constant, or the width of a tensor."""
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
        return _is_fixed(node.value) or (
            isinstance(node.value, ast.Name) and node.value.id in ("math", "self", "torch")
        )
    return False


def _is_own_dtype(*operands: ast.expr) -> bool:
    """Return True if a tensor's dtype is compared with that of the module's weights; the op requires them to be
    equal.
    """
    dtypes = [operand for operand in operands if isinstance(operand, ast.Attribute) and operand.attr == "dtype"]
    return len(dtypes) == len(operands) and any(ast.unparse(dtype).startswith("self.") for dtype in dtypes)


def _is_last(index: ast.expr) -> bool:
    return ast.unparse(index) == "-1"
