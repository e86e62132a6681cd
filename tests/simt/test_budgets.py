"""What the kernels' speed hangs on stays what it is: no bank conflicts, whole sectors, every byte read once."""

from __future__ import annotations

import pytest
from budgets import BUDGETS, count, worst


@pytest.mark.parametrize("name", BUDGETS)
def test_no_kernel_needs_more_than_its_budget(operators, name: str) -> None:
    budget, counted = BUDGETS[name], count(operators, name)
    for tensor, times in counted.reads.items():
        assert times <= 1.02 * budget.reads.get(tensor, 1.0), f"{tensor} is read {times:.2f} times"
    assert counted.written <= 1.02 * budget.written
    for instruction in ("mma", "ldmatrix"):
        issued = sum(c["count"] for c in counted.places if c["instruction"].startswith(instruction))
        assert issued <= getattr(budget, instruction), instruction
    for what, allowed in (("wavefronts", budget.wavefronts), ("sectors", budget.sectors)):
        found = worst(counted, what)
        over = {place: times for place, times in found.items() if times > allowed.get(place, 1.0)}
        assert over == {}, f"{what} over the fewest"
        assert set(found) == set(allowed), "what has been mended has no budget any more"
