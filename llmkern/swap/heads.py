"""Find the rows whose heads a tensor [B, heads, tokens, D] holds, and any rotary embedding applied in between."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from llmkern.swap.track import Arranged, Refused, Value, uniform

if TYPE_CHECKING:
    from llmkern.swap.record import Recorder

__all__ = ["heads"]

_UNROTATED = "it multiplies queries or keys by cosines and sines otherwise than rope does"


class _Turn(NamedTuple):
    """A rotary embedding: its tables, how many columns of each head it rotates, how they are paired, and whether only
    half of the tables is read.
    """

    cos: Value
    sin: Value
    rotary: int
    interleaved: bool
    half: bool


def heads(recorder: Recorder, arranged: Arranged, what: str) -> tuple[Value, int, float]:
    """Return the value, its number of heads, and the factor it is multiplied by.  Raises `Refused`."""
    source, turn = _before_rope(recorder, arranged)
    factor = uniform(source.factor)
    seen = source.identities
    if seen.dim() != 4:
        raise Refused(f"{what} have {seen.dim()} dimensions")
    group = _repeated(seen)
    seen = seen[:, ::group]
    batch, count, tokens, dim = seen.shape
    value, places = recorder.values.rows(Arranged(seen), what)
    in_order = torch.arange(places.numel()).view(batch, tokens, count, dim).transpose(1, 2)
    if not torch.equal(places, in_order):
        raise Refused(f"{what} take heads in another order")
    if turn is None:
        return value, count, factor
    return _turned(recorder, value, turn, dim), count, factor


def _repeated(seen: Tensor) -> int:
    """Return how many consecutive heads are copies of the same one."""
    group = 1
    while group < seen.shape[1] and torch.equal(seen[:, group], seen[:, 0]):
        group += 1
    if seen.shape[1] % group or not torch.equal(seen[:, ::group].repeat_interleave(group, 1), seen):
        raise Refused("it repeats heads of keys and values unevenly")
    return group


def _turned(recorder: Recorder, value: Value, turn: _Turn, dim: int) -> Value:
    for node in recorder.nodes:
        if node.op == "rope" and node.values == [value, turn.cos, turn.sin]:
            return node.results[0]
    rotary = None if turn.rotary == dim else turn.rotary
    options: dict[str, Any] = {"dim": dim, "rotary": rotary, "interleaved": turn.interleaved, "half": turn.half}
    return recorder.node("rope", [value, turn.cos, turn.sin], [value.shape], **options)[0]


def _before_rope(recorder: Recorder, arranged: Arranged) -> tuple[Arranged, _Turn | None]:
    """Return the value before rotation and the rotation; a value that is not rotated is returned unchanged."""
    seen = arranged.identities
    turning = torch.zeros(seen.shape, dtype=torch.bool)
    products = [value for value in recorder.values.all if value.kind == "terms" and value.terms]
    sources: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # of each table: rows, factor, table
    tables: dict[str, Value] = {}
    for value in products:
        of_this = (seen >= value.first) & (seen < value.first + value.numel)
        if not bool(of_this.any()):
            continue
        turning |= of_this
        if len(value.terms) != 2:
            raise Refused(_UNROTATED)
        places = seen[of_this] - value.first
        for term in value.terms:
            table = recorder.values.within(term.table)
            if table is None:
                raise Refused(_UNROTATED)
            tables[table.name] = table
            if table.name not in sources:
                empty = torch.zeros_like(seen), torch.zeros(seen.shape, dtype=torch.float64), torch.zeros_like(seen)
                sources[table.name] = empty
            for into, found in zip(sources[table.name], _flat(term), strict=True):
                into[of_this] = found[places].to(into.dtype)
    if not sources:
        return arranged, None
    if sources.keys() != {"cos", "sin"} or seen.dim() != 4:
        raise Refused(_UNROTATED)
    own, factor, cos = sources["cos"]
    rows = torch.where(turning, own, seen)
    factors = torch.where(turning, factor, torch.ones(())) * arranged.factor
    rotary = int(turning[0, 0, 0].sum())
    turn = _pairing(rows, factors, cos, sources["sin"], turning, rotary, tables)
    return Arranged(rows, factors), turn


def _flat(term: Any) -> tuple[Tensor, Tensor, Tensor]:
    factor = torch.as_tensor(term.rows.factor, dtype=torch.float64) * torch.as_tensor(term.table.factor)
    return (
        term.rows.identities.flatten(),
        factor.expand(term.rows.identities.shape).flatten(),
        term.table.identities.flatten(),
    )


def _pairing(
    rows: Tensor,
    factors: Tensor,
    cos: Tensor,
    sines: tuple[Tensor, Tensor, Tensor],
    turning: Tensor,
    rotary: int,
    tables: dict[str, Value],
) -> _Turn:
    """Return the rotation that these products form: out[a] = x[a]·cos − x[b]·sin, out[b] = x[b]·cos + x[a]·sin per
    pair.
    """
    batch, _, tokens, dim = rows.shape
    columns = torch.arange(dim)
    if not torch.equal(turning, (columns < rotary).expand(turning.shape)) or rotary % 2:
        raise Refused(_UNROTATED)
    width = tables["cos"].shape[-1]
    if tables["sin"].shape != tables["cos"].shape or width not in (rotary, rotary // 2):
        raise Refused(_UNROTATED)
    partners, partner_factors, sin = (x[..., :rotary] for x in sines)
    row = torch.arange(batch)[:, None, None, None] * (tokens if tables["cos"].shape[0] > 1 else 0)
    row = row + torch.arange(tokens)[:, None]
    half, pair = rotary // 2, torch.arange(rotary)
    for interleaved, halved in itertools.product((False, True), (False, True) if width == rotary else (False,)):
        partner = pair ^ 1 if interleaved else (pair + half) % rotary
        sign = torch.where((pair % 2 == 0) if interleaved else (pair < half), -1.0, 1.0)
        once = halved or width != rotary  # one entry for each pair
        index = (pair // 2 if interleaved else pair % half) if once else pair
        entries = row * width + index
        turned = torch.equal(partners, rows[..., partner])
        signed = torch.allclose(partner_factors, factors[..., :rotary] * sign, rtol=1e-12)
        looked_up = all(
            torch.equal(found, (entries + tables[name].first).expand(found.shape))
            for name, found in (("cos", cos[..., :rotary]), ("sin", sin))
        )
        if turned and signed and looked_up:
            return _Turn(tables["cos"], tables["sin"], rotary, interleaved, halved)
    raise Refused(_UNROTATED)
