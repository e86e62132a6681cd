"""`optimize_`, its exact undo `restore_`, and both as a context manager."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from llmkern import dispatch
from llmkern.checks import check_choice
from llmkern.memory import move_back_, move_to_huge_pages_
from llmkern.swap import derive
from llmkern.swap.edit import Edit, edited, edits_of
from llmkern.swap.layer_stack import forget
from llmkern.swap.match import Match, linear_like, remembering_refusals
from llmkern.swap.observe import settled
from llmkern.swap.packed_experts import layout_of
from llmkern.swap.report import SwapReport, SwapRow, current, forget_report, record_report
from llmkern.swap.rules import rules
from llmkern.swap.rules.attention import skipping_masks

__all__ = ["optimize_", "patched", "restore_"]

FilterFn = Callable[[nn.Module, str], bool]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class _Site:
    """A module that a rule has found, and the decision about it."""

    path: str
    module: nn.Module
    found: Match
    excluded: str  # why the caller does not want it, "" if it does


def optimize_(
    model: Model,
    *,
    attention: bool = True,
    norms: bool = True,
    mlp: bool = True,
    rope: bool = True,
    linear: bool = True,
    loss: bool = True,
    kv_cache: Literal["auto", "int8"] | None = "auto",
    huge_pages: bool = True,
    filter_fn: FilterFn | None = None,
    on_unsupported: Literal["warn", "error", "ignore"] = "warn",
) -> Model:
    """Swap llmkern's ops into `model`, in place and in this instance only; `llmkern.report(model)` says where.

    attention, norms, mlp, rope, linear: which kinds of modules to swap (mlp includes GELU modules; linear are large
        layers on the CPU that belong to none of the others, output heads above all).
    loss: compute a causal language model's own loss, where it is given labels and gradients are computed, by
        `linear_cross_entropy` without its logits; the result computes `logits` when they are read.
    kv_cache: the cache that the model makes where the caller gives and chooses none.  "auto": on the CPU an
        `llmkern.KVCache`, in `generate` and, without gradients, in a forward with use_cache; of an encoder-decoder for
        the decoder's own tokens.  transformers' own for models with a kind of cache of their own.  "int8": the same
        with int8 keys and values, and a model that keeps its own counts as unsupported.  None: transformers' own.
    huge_pages: give weights on the CPU, where they are many, pages of 2 MiB, which are read faster (`llmkern.memory`):
        parameters stay the same objects with the same values, large ones where they are, small ones in other memory
        until `restore_`.  Those of which somebody else has a tensor (a view, an older state_dict) stay where they are.
    filter_fn: takes (module, path), as torchao's does; a module for which it is false is left alone.  It warns where
        that leaves nothing.
    on_unsupported: what to do where a module of these kinds cannot be swapped: warn once, raise `RuntimeError`
        before anything has changed, or say nothing.  The report has the reasons in any case.
    Returns the model.  Calling it again adds what was left out before and changes nothing else; `restore_` undoes
    all of it.  What changes in a module afterwards counts at once: where the swapped one cannot follow, its calls run
    untouched, with the reason in `explain`, until this is called again.
    Names propose, a probe decides: a module is swapped if a small copy of it computes what the op does, near and far,
    and its source decides nothing by sizes, dtypes or contents (`llmkern/swap/observe.py`).
    Raises TypeError for what is not a module, ValueError for a model on the meta device; a failure half-way leaves
    the model as it was.
    """
    _check(model, filter_fn, kv_cache, on_unsupported)
    switches = {
        "attention": attention,
        "norms": norms,
        "mlp": mlp,
        "rope": rope,
        "linear": linear,
        "loss": loss,
        "kv_cache": kv_cache,
    }
    with settled(), remembering_refusals():  # for the probes
        sites = _resolved(list(_sites(model, switches, filter_fn)))
    wanted = [s for s in sites if not s.excluded and not s.found.reason]
    if filter_fn is not None and sites and not wanted:
        warnings.warn("optimize_: filter_fn is false for every module; nothing is swapped", UserWarning, stacklevel=2)
    unsupported = [s for s in sites if s.found.reason and not s.excluded]
    if unsupported and on_unsupported == "error":
        raise RuntimeError("; ".join(f"{s.path}: {s.found.reason}" for s in unsupported))
    wanted = [s for s in wanted if not s.found.only_for_children or any(_is_framed(w, s) for w in wanted)]
    with _undo_on_failure(model):
        for site in wanted:
            if site.found.cls is not None:
                derive.set_class(site.module, site.found.cls)
            if site.found.is_whole:  # it takes weights of plain linear layers only
                for child in _linears(site.module):
                    if "_llmkern_original" in vars(type(child)):  # else somebody has derived from it since
                        derive.set_class(child, derive.original_class(child))
        for module, edits in _edits(model, sites, wanted):
            derive.set_class(module, edited(module, edits))
        rows = tuple(_row(model, site) for site in sites if not site.found.only_for_children)
        moved = move_to_huge_pages_(model) if huge_pages and wanted else 0
    if unsupported and on_unsupported == "warn":
        reasons = sorted({s.found.reason for s in unsupported})
        warnings.warn(
            f"llmkern leaves {len(unsupported)} modules as they are: {'; '.join(reasons)}", UserWarning, stacklevel=2
        )
    record_report(model, SwapReport(rows, moved))
    return model


def restore_(model: Model) -> Model:
    """Undo `optimize_` exactly: every module has its own class and forward again.  Returns `model`.

    A model that was never optimized is left as it is.  A class that was derived from a swapped module's since, as by
    FSDP2's `fully_shard`, is derived from the module's own instead; RuntimeError where its methods forbid that: what
    made it has to be undone first.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore_: model is a {type(model).__name__}, expected a torch.nn.Module")
    swapped = [(path, m) for path, m in model.named_modules() if derive.is_swapped(m)]
    for path, module in swapped:
        if derive.restored_class(type(module)) is None:
            raise RuntimeError(f"restore_: {path} has become a {type(module).__name__} since; undo that first")
    for _, module in swapped:
        derive.set_class(module, derive.restored_class(type(module)))
        forget(module)
    move_back_(model)
    forget_report(model)
    return model


@contextlib.contextmanager
def patched(model: nn.Module, **options: Any) -> Iterator[SwapReport]:
    """Swap for the block, as `optimize_(model, **options)` does; the model is untouched after it, whatever happens.

    The block is given the report.
    """
    report = current(optimize_(model, **options))
    assert report is not None
    try:
        yield report
    finally:
        restore_(model)


def _check(model: nn.Module, filter_fn: FilterFn | None, kv_cache: str | None, on_unsupported: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize_: model is a {type(model).__name__}, expected a torch.nn.Module")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            f"optimize_: filter_fn is a {type(filter_fn).__name__}, expected a function of (module, path) or None"
        )
    check_choice("optimize_", "kv_cache", kv_cache, ("auto", "int8", None))
    if on_unsupported not in ("warn", "error", "ignore"):
        raise ValueError(f"optimize_: on_unsupported is {on_unsupported!r}, expected 'warn', 'error' or 'ignore'")
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and not hasattr(module, "_hf_hook"):
                where = f"{path}.{name}" if path else name
                raise ValueError(f"optimize_: {where} is on the meta device; load the weights first")


def _sites(model: nn.Module, switches: dict[str, Any], filter_fn: FilterFn | None) -> Iterator[_Site]:
    absorbed: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # compiled: its class cannot be changed
            continue
        for rule in rules():
            found = rule.find(derive.as_before(module))
            if found is None or id(module) in absorbed:
                continue
            found = _chosen(found, module, switches[rule.SWITCHES[0]])
            excluded = ""
            if not _is_swapped(module, found):
                needed = found.switches or rule.SWITCHES
                off = [f"{switch}={switches[switch]}" for switch in needed if not switches[switch]]
                if off and (found.is_whole or len(off) == len(needed)):
                    excluded = f"switched off by {' and '.join(off)}"
                elif filter_fn is not None and not found.only_for_children and not filter_fn(module, path):
                    excluded = "left out by filter_fn"
                elif not found.reason and derive.forward_is_replaced(module):
                    found = Match(found.kind, found.op, "its forward was replaced on the instance")
                if found.is_whole or found.kind == "loss" or (found.kind == "cache" and switches["kv_cache"] == "auto"):
                    excluded = excluded or found.reason  # nobody has asked for what it cannot have
            if found.kind == "mlp" and not found.reason and not excluded:
                absorbed |= {id(child) for child in module.children()}  # its activation is no longer called
            yield _Site(path, module, found, excluded)


def _chosen(found: Match, module: nn.Module, choice: Any) -> Match:
    """Return the matches with the edit for this value of the switch; "auto" leaves modules that are swapped already."""
    if choice == "auto":
        had = edits_of(module)
        return replace(found, edit=next((edit for edit in found.edits.values() if edit in had), found.edit))
    return replace(found, edit=found.edits.get(choice, found.edit))


def _resolved(sites: list[_Site]) -> list[_Site]:
    """Resolve nesting: a layer is fused only if all its parts may be swapped.

    Linear layers do not count as parts; a fused layer reads their weights directly.  Nor do parts that no op serves by
    themselves: what they compute was read with the layer.
    """
    stays = [site for site in sites if site.excluded or (site.found.reason and site.found.op)]
    left = [site.path for site in stays if not linear_like(site.module)]
    settled: list[_Site] = []
    absorbed: set[int] = set()
    for site in sites:  # a layer comes before what is within it
        if site.found.is_whole and not site.excluded:
            if inner := [path for path in left if path.startswith(f"{site.path}.")]:
                site = replace(site, excluded=f"a part of it is left alone: {inner[0]}")
            else:
                absorbed |= {id(child) for child in site.module.modules() if linear_like(child) or layout_of(child)}
        if id(site.module) not in absorbed:
            settled.append(site)
    return settled


def _is_framed(site: _Site, frame: _Site) -> bool:
    """Return True if the frame is swapped for the sake of this site."""
    within = site.path.startswith(f"{frame.path}." if frame.path else "") and site is not frame
    return within and frame.found.for_op in ("", site.found.op)


def _linears(layer: nn.Module) -> list[nn.Module]:
    return [child for child in layer.modules() if linear_like(child)]


def _is_swapped(module: nn.Module, found: Match) -> bool:
    if found.edit is None:
        return found.cls is type(module)
    had = edits_of(module)
    return found.edit in had or any(edit in had for edit in found.edits.values() if found.kind == "attention")


def _edits(model: nn.Module, sites: list[_Site], wanted: list[_Site]) -> list[tuple[nn.Module, list[Edit]]]:
    """Return the modules whose own forwards are edited, and their edits."""
    chosen: dict[str, list[Edit]] = {}
    for site in wanted:
        if site.found.edit is not None:
            chosen.setdefault(site.path, []).append(site.found.edit)
    attending = {site.path: site for site in sites if site.found.kind == "attention"}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        within = [site for at, site in attending.items() if at.startswith(prefix) and at != path]
        if not within or any(site not in wanted or site.found.edit is None for site in within):
            continue  # one of them takes masks as the model makes them
        if skipping := skipping_masks(module, {site.path.removeprefix(prefix): site.found for site in within}):
            edit, theirs = skipping
            chosen.setdefault(path, []).append(edit)
            for site in within:
                others = [e for e in chosen[site.path] if e not in site.found.edits.values()]
                chosen[site.path] = [*others, theirs[site.path.removeprefix(prefix)]]
    return [(model.get_submodule(path), edits) for path, edits in chosen.items()]


def _row(model: nn.Module, site: _Site) -> SwapRow:
    found = site.found
    reason = site.excluded or found.reason
    if reason:
        return SwapRow(site.path, found.kind, found.op, "left", "", reason)
    if found.served:
        served = next(found.served[choice] for choice, edit in found.edits.items() if edit == found.edit)
        return SwapRow(site.path, found.kind, found.op, "swapped", served, "")
    return SwapRow(site.path, found.kind, found.op, "swapped", *_serving(model, site))


def _serving(model: nn.Module, site: _Site) -> tuple[str, str, str, str]:
    """Return the backend that serves the site for inputs of its parameters' dtype on their device ("" if none), the
    backend's source file, and the site's program.
    """
    parameters = itertools.chain(site.module.parameters(), model.parameters())
    like = next((p for p in parameters if p.is_floating_point()), torch.empty(0))
    assert site.found.sample is not None  # whatever can be swapped has one
    call = site.found.sample(like.dtype, like.device)
    with torch.no_grad():
        serving = dispatch.select(site.found.op, call)
    if site.found.is_whole and not serving.backend.kernels:
        return "its parts", "", "", ""
    return serving.backend.name, "", serving.source, dispatch.about(site.found.op, call)


@contextlib.contextmanager
def _undo_on_failure(model: nn.Module) -> Iterator[None]:
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, cls, attributes in before:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
        raise
