"""The TPU's kernels compiled by libtpu for chips that are not here, within the VMEM that their plans say.

`pytest -s` prints what each takes.  The interpreter judges their results (tests/ops/test_contract.py).
"""

from __future__ import annotations

import pytest

from llmkern import dispatch
from llmkern import jax as twins
from llmkern.testing.tpu_calls import calls
from llmkern.testing.tpu_offline import compiled, missing

OPS = sorted({impl.op for op in dispatch.ops() for impl in dispatch.implementations(op) if impl.backend.name == "tpu"})
CHIPS = ["v5e", "v6e", "v5p", "v4"]

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


def refused(chip: str, call: dict) -> bool:
    """v4 multiplies no integers."""
    return chip == "v4" and "w_q" in call and call.get("scheme") != "w8a16"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_within_its_plan(chip: str, op: str) -> None:
    """Every call for v5e, and those with blocks of the table's size for the others."""
    for call in calls(op) if chip == "v5e" else calls(op)[:1]:
        arrays = {name: value for name, value in call.items() if hasattr(value, "shape")}
        plain = {name: value for name, value in call.items() if name not in arrays}

        def run(arrays, plain=plain):
            return getattr(twins, op)(**arrays, **plain)

        if refused(chip, call):
            with pytest.raises(ValueError, match="v4 has no int8 products"):
                compiled(chip, run, arrays)
            continue
        made = compiled(chip, run, arrays)
        assert len(made.vmem) == len(made.plans) > 0
        for plan, used in zip(made.plans, made.vmem, strict=True):
            print(f"\n{plan}; the compiler takes {used / 2**20:.2f} MiB")
            assert 0 < used <= plan.vmem <= plan.chip.budget < plan.chip.vmem


def test_what_does_not_fit_is_refused_before_the_compiler() -> None:
    """By our sentence on a chip with little VMEM; a chip with more compiles the same call."""
    import jax

    def run(x):
        return twins.rms_norm(x)

    with pytest.raises(ValueError, match=r"norm would take .* MiB of VMEM .* v4 has 12 MiB for a kernel"):
        compiled("v4", run, jax.ShapeDtypeStruct((32, 2**16), "float32"))
    fits = compiled("v5e", run, jax.ShapeDtypeStruct((32, 2**16), "float32"))
    assert fits.plans[0].vmem > 12 * 2**20
