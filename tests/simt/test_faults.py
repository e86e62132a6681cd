"""The SIMT machine judges: it finds mistakes planted in a copy of a kernel that a GPU might show once in a while."""

from __future__ import annotations

import itertools

import pytest
import torch
from machine import ROOT, Machine, Unavailable, build

KERNEL = ROOT / "csrc" / "cuda" / "int8_matmul.cu"
ENTRY = """
extern "C" __attribute__((visibility("default"))) void matmul(const int8_t* a, const int8_t* w, int32_t* out, int m,
                                                              int n, int k) {
  llmkern::launch_int8_matmul({.a = a, .w = w, .out = out, .a_rows = llmkern::dense_rows(m, k), .n = n, .k = k,
                               .w_stride = k, .sums = true},
                              llmkern::simt::settings.gpu);
}
"""
FAULTS = {
    "nothing": ("", ""),
    "no-wait": ("    ptx::cp_async_wait_group<kTile.stages - 2>();\n", ""),
    "no-barrier": ("    __syncthreads();  // this step's", "    // this step's"),
    "no-barrier-behind-the-loop": ("  __syncthreads();  // the last tiles", "  // the last tiles"),
    "no-swizzle-on-one-side": ("tile + swizzled(row_of(i), chunk)", "tile + row_of(i) * kStepBytes + chunk * kChunk"),
}


def wrong_results(machine: Machine) -> list[str]:
    """Under which seed and arrival of copies the product is not exact."""
    m, n, k = 70, 66, 336
    generator = torch.Generator().manual_seed(0)
    a, w = (torch.randint(-128, 128, (rows, k), generator=generator, dtype=torch.int8) for rows in (m, n))
    exact = (a.double() @ w.double().T).to(torch.int32)
    found = []
    for seed, late in itertools.product(range(4), (False, True)):
        out = torch.zeros(m, n, dtype=torch.int32)
        machine.set(seed=seed, late_copies=late)
        with machine.memory(a=a, w=w), machine.memory(writable=True, out=out):
            machine.call("matmul", a, w, out, m, n, k)
        if machine.error() or not torch.equal(out, exact):
            found.append(f"seed {seed}, copies {'late' if late else 'at once'}")
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    before, after = FAULTS[fault]
    text = KERNEL.read_text()
    assert fault == "nothing" or text.count(before) == 1, "the kernel has changed: plant the fault anew"
    copy = ROOT / "build" / "simt" / "faults" / f"{fault}.cu"
    copy.parent.mkdir(parents=True, exist_ok=True)
    planted = text.replace(before, after, 1) + ENTRY
    if not copy.exists() or copy.read_text() != planted:
        copy.write_text(planted)
    try:
        machine = Machine(build(f"fault-{fault}", [copy]))
    except Unavailable as why:
        pytest.skip(str(why))
    found = wrong_results(machine)
    if fault == "nothing":
        assert found == []
    elif fault == "no-wait":
        assert found == [f"seed {seed}, copies late" for seed in range(4)]
    else:
        assert len(found) >= 4, found
