"""Read in a decoder's source whether it calls its layers one after the other with nothing in between.

What layers return behind the hidden states may be handed on to the next layer as an argument, as T5's hand on the bias
that the first one makes.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

from llmkern.swap.derive import wrapped_functions

__all__ = ["LayerLoop", "layer_loop"]

_COUNT = "num_hidden_layers"
_FIXED = (ast.Name, ast.Constant, ast.Attribute, ast.IfExp, ast.BoolOp, ast.UnaryOp, ast.boolop, ast.unaryop, ast.Load)
_ASKED = (*_FIXED, ast.Compare, ast.Is, ast.IsNot)


class LayerLoop(NamedTuple):
    """A loop `for layer in self.<layers>: x = layer(x, …)`, in evaluation.

    counted: it runs over the first `config.num_hidden_layers` of them, not over all.
    results: elements of the tuple that a layer returns, x first; 0 where it returns x.
    handed: which of them becomes which argument of the next layer: numbers of results, and names of arguments or
        numbers of those behind x.
    """

    layers: str
    counted: bool
    results: int = 0
    handed: tuple[tuple[int, int | str], ...] = ()


class _Step(NamedTuple):
    """One call of a layer: names of its results, and its arguments behind the hidden states."""

    results: tuple[str, ...]
    arguments: dict[int | str, ast.expr]


@functools.cache
def layer_loop(forward: Callable[..., Any]) -> LayerLoop | None:
    """Return the loop of a decoder's forward (below its decorators) if nothing else happens to the hidden states
    between the first layer and the last; None otherwise, or if there is no source.
    """
    found, functions = [], wrapped_functions(forward)
    for function in functions:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function.__code__)))  # functools.wraps names another
        except (OSError, TypeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.For) and (plain := _plain(node)) is not None and _is_alone(tree, node, plain):
                found.append((plain, function))
    if len(found) != 1:
        return None
    ((loop, owner),) = found
    told = [function for function in functions if loop.layers in function.__code__.co_names]
    return loop if told == [owner] else None


def _plain(loop: ast.For) -> LayerLoop | None:
    over, target = loop.iter, loop.target
    index: str | None = None
    if isinstance(over, ast.Call) and _is_name(over.func, "enumerate") and len(over.args) == 1 and not over.keywords:
        if not isinstance(target, ast.Tuple) or len(target.elts) != 2:
            return None
        index = ast.unparse(target.elts[0])
        over, target = over.args[0], target.elts[1]
    counted = isinstance(over, ast.Subscript)
    if isinstance(over, ast.Subscript):
        if not _is_first_layers(over.slice):
            return None
        over = over.value
    if not isinstance(over, ast.Attribute) or not _is_name(over.value, "self") or not isinstance(target, ast.Name):
        return None
    body = _in_evaluation(loop.body)
    step = None if loop.orelse or not body else _step(body[0], target.id, index)
    handed = None if step is None else _handed(body[1:], step)
    if step is None or handed is None:
        return None
    results = len(step.results) if isinstance(body[0].targets[0], ast.Tuple) else 0  # type: ignore[attr-defined]
    return LayerLoop(over.attr, counted, results, handed)


def _in_evaluation(body: list[ast.stmt]) -> list[ast.stmt]:
    """Drop the statements that skip layers in training (LayerDrop, arXiv:1909.11556): `if self.training and …:`, and
    the flag that it may set.
    """
    body = [each for each in body if not (isinstance(each, ast.If) and not each.orelse and _is_for_training(each.test))]
    if len(body) != 2 or not isinstance(body[0], ast.Assign) or not isinstance(body[1], ast.If) or body[1].orelse:
        return body
    flag, wanted = body[0], body[1].test
    if isinstance(wanted, ast.BoolOp) and isinstance(wanted.op, ast.Or):
        wanted = wanted.values[0]
    drops = isinstance(flag.value, ast.Constant) and flag.value.value is False
    names = [ast.unparse(target) for target in flag.targets]
    return body[1].body if drops and [ast.unparse(wanted)] == [f"not {name}" for name in names] else body


def _is_for_training(test: ast.expr) -> bool:
    several = isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And)
    return several and ast.unparse(test.values[0]) == "self.training"  # type: ignore[attr-defined]


def _is_alone(tree: ast.AST, loop: ast.For, found: LayerLoop) -> bool:
    """Check that only the loop mentions the layers, and that nothing reads its variables, or what layers hand on,
    after it.
    """
    mentioned = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == found.layers]
    within = {id(node) for node in ast.walk(loop)}
    variables = {node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name)} | {found.layers}
    outside = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in within]
    inside = [node for statement in _in_evaluation(loop.body) for node in ast.walk(statement)]
    assigned = [node.id for node in inside if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    read = [node for node in outside if node.id in assigned[1:] and isinstance(node.ctx, ast.Load)]  # but x
    return len(mentioned) == 1 and not read and not any(node.id in variables for node in outside)


def _is_first_layers(index: ast.expr) -> bool:
    """Recognize `: self.config.num_hidden_layers`."""
    if not isinstance(index, ast.Slice) or index.lower is not None or index.step is not None:
        return False
    return index.upper is not None and ast.unparse(index.upper) == f"self.config.{_COUNT}"


def _step(statement: ast.stmt, layer: str, index: str | None) -> _Step | None:
    """Recognize `x = layer(x, …)` or `x, y, … = layer(x, …)` in which every other argument is the same for each layer,
    or a variable.
    """
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    target, call = statement.targets[0], statement.value
    names = target.elts if isinstance(target, ast.Tuple) else [target]
    results = tuple([name.id for name in names if isinstance(name, ast.Name)])
    if len({*results}) != len(names) or not isinstance(call, ast.Call) or not _is_name(call.func, layer):
        return None
    if not call.args or not _is_name(call.args[0], results[0]):
        return None
    others: dict[int | str, ast.expr] = dict(enumerate(call.args[1:]))
    others |= {keyword.arg or "**": keyword.value for keyword in call.keywords}
    fixed = all(_is_fixed(other, layer, index, *results) for other in others.values())
    return _Step(results, others) if fixed else None


def _handed(statements: list[ast.stmt], step: _Step) -> tuple[tuple[int, int | str], ...] | None:
    """Recognize `argument = result`, whatever it depends on; returns which results become which arguments."""
    found: list[tuple[int, int | str]] = []
    for statement in statements:
        inner = statement.body if isinstance(statement, ast.If) and not statement.orelse else [statement]
        if isinstance(statement, ast.If) and not all(isinstance(node, _ASKED) for node in ast.walk(statement.test)):
            return None
        for each in inner:
            if not isinstance(each, ast.Assign) or len(each.targets) != 1:
                return None
            target, value = each.targets[0], each.value
            if not isinstance(target, ast.Name) or not isinstance(value, ast.Name) or target.id in step.results:
                return None
            places = [place for place, other in step.arguments.items() if _is_name(other, target.id)]
            mentions = [
                node for other in step.arguments.values() for node in ast.walk(other) if _is_name(node, target.id)
            ]
            if value.id not in step.results[1:] or len(mentions) != len(places):
                return None
            found += [(step.results.index(value.id), place) for place in places]
    return tuple(found)


def _is_fixed(value: ast.expr, layer: str, index: str | None, *results: str) -> bool:
    """Recognize expressions that give the same object in every iteration if all layers are of one kind: names,
    constants, attributes, choices between them, and a dictionary's entry for this layer's kind.
    """
    kinds = (f"self.config.layer_types[{index}]", f"{layer}.attention_type")
    if isinstance(value, ast.Subscript) and ast.unparse(value.slice) in kinds:
        value = value.value
    own = (*results, layer, index)
    nodes = list(ast.walk(value))
    named = [node.id for node in nodes if isinstance(node, ast.Name)]
    return all(isinstance(node, _FIXED) for node in nodes) and not any(name in own for name in named)


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
