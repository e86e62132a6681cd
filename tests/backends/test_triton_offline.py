"""Every Triton kernel, in every configuration that its launcher may choose, compiled for GPUs that are not here.

What the compilers make of it is asserted: no spilled registers, shared memory within a program's limit, tensor cores
where they are meant, and copies that run ahead of the loops.  For AMD it is enough that Triton compiles.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmkern import dispatch
from llmkern.backends import triton as backend
from llmkern.testing.triton_calls import calls
from llmkern.testing.triton_offline import SHARED_LIMIT, TARGETS

ROOT = Path(__file__).parents[2]
OPS = [op for op in dispatch.ops() if any(i.backend is backend.TRITON for i in dispatch.implementations(op))]
MATMULS = ("int8_matmul_kernel", "attention_kernel", "decode_kernel", "dq_kernel", "dkv_kernel")
pytestmark = pytest.mark.skipif(not backend.installed(), reason="Triton is not installed")


ATTENTION = [op for op in OPS if op.startswith("attention")]
# Two processes: each needs seconds to begin.
GROUPS = {"attention": ATTENTION, "others": [op for op in OPS if op not in ATTENTION]}


def made(ops: list[str]) -> list[dict[str, Any]]:
    """What a process without TRITON_INTERPRET compiles for `ops`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "llmkern.testing.triton_offline", *ops],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=2400,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def name(row: dict[str, Any]) -> str:
    return f"{row['target']} {row['kernel']} {row['dtype']} {row['constants']}"


@pytest.mark.parametrize("group", GROUPS)
def test_compiles_well(group: str) -> None:
    rows = made(GROUPS[group])
    assert {(row["op"], row["target"]) for row in rows} == set(itertools.product(GROUPS[group], TARGETS))
    for row in rows:
        assert row["shared"] <= SHARED_LIMIT[row["target"]], name(row)
        if row["target"] == "gfx942":
            continue
        assert row["spills"] == 0, f"{name(row)}: {row['spills']} spills in {row['registers']} registers"
        if row["kernel"] in MATMULS:
            _assert_fed(row)


def _assert_fed(row: dict[str, Any]) -> None:
    """A loop over tiles: tensor cores but in fp32, and where there are stages, copies ahead of their use."""
    if row["dtype"] != "*fp32":
        integers = row["dtype"] == "*i8"
        warp, warpgroup = ("IMMA", "IGMMA") if integers else ("HMMA", "HGMMA")
        assert row[warp] + row[warpgroup] > 0, f"{name(row)}: no product on tensor cores"
        # A warpgroup multiplies 64 rows at least.
        wide = row["target"] == "sm90" and row["constants"]["BLOCK_M"] >= 64 and row["kernel"] in MATMULS[:2]
        assert row[warpgroup] > 0 or not wide, f"{name(row)}: Hopper's own products are not used"
    if row["constants"]["num_stages"] > 1 and row["aligned"]:
        assert row["LDGSTS"] > 0, f"{name(row)}: nothing is copied ahead"


def test_each_op_has_calls_for_each_target() -> None:
    for op in OPS:
        for target in TARGETS:
            found = calls(op, target)
            assert found, f"{op} for {target}"
            assert all(
                value.device.type == "meta" for call in found for value in call.values() if torch.is_tensor(value)
            )


def test_amd_is_part_of_this_triton() -> None:
    assert importlib.util.find_spec("triton.backends.amd") is not None
