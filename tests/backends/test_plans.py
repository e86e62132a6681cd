"""The CUDA launchers' heuristics, asked through llmkern._C: no GPU is needed."""

from __future__ import annotations

import itertools

import pytest
import torch

from llmkern import dispatch
from llmkern.config import settings
from llmkern.preference import in_order
from llmkern.why import why

_C = pytest.importorskip("llmkern._C", reason="llmkern._C was not built")
HIDDEN = (1, 7, 8, 300, 577, 1024, 4096, 8192, 20000, 65536)


@pytest.mark.parametrize("element_bytes", [2, 4])
def test_rows_keep_the_limits_of_a_block(element_bytes: int) -> None:
    for rows, hidden, aligned, sms in itertools.product((1, 3, 199, 10**6), HIDDEN, (False, True), (4, 108, 132)):
        plan = _C.plan("norm", [rows, hidden], element_bytes, aligned, sms)
        assert plan["threads"] % 32 == 0
        assert 32 <= plan["threads"] <= 512
        assert plan["blocks"] * plan["rows_per_block"] >= rows
        assert plan["blocks"] < 2**31
        assert plan["vector"] in ({1, 16 // element_bytes} if aligned else {1})
        assert 1 <= plan["blocks_per_sm"] <= 64 * 32 // plan["threads"]
        if hidden <= 32768 // element_bytes * 2 and plan["vector"] > 1:  # all of the row is in registers
            assert plan["threads"] // plan["rows_per_block"] * plan["held"] * plan["vector"] >= hidden


def test_short_rows_take_a_warp_and_long_ones_a_block() -> None:
    assert _C.plan("norm", [4096, 1024])["rows_per_block"] == 4
    assert _C.plan("norm", [4096, 4096])["rows_per_block"] == 1
    assert _C.plan("norm", [1, 4096])["threads"] > _C.plan("norm", [4096, 4096])["threads"]


@pytest.mark.parametrize(
    ("shape", "sm_count", "kernel", "tile"),
    [
        ((1, 4096, 4096), 132, "int8_decode", (8, 16)),
        ((16, 4096, 4096), 132, "int8_decode", (16, 16)),
        ((17, 4096, 4096), 132, "int8_matmul", (64, 64)),
        ((4096, 4096, 4096), 132, "int8_matmul", (128, 256)),
        ((512, 4096, 4096), 132, "int8_matmul", (128, 128)),  # 64 wide tiles would leave SMs idle
        ((128, 1024, 1024), 132, "int8_matmul", (64, 64)),
        ((1024, 1024, 4096), 16, "int8_matmul", (128, 256)),
    ],
)
def test_products(shape: tuple[int, int, int], sm_count: int, kernel: str, tile: tuple[int, int]) -> None:
    plan = _C.plan("int8_matmul", list(shape), 1, True, sm_count)
    assert (plan["kernel"], plan["tile"]) == (kernel, tile)
    assert plan["blocks"] == -(-shape[0] // tile[0]) * -(-shape[1] // tile[1]) * plan["parts"]
    assert plan["shared_bytes"] <= 99 * 1024
    (entry,) = [e for e in _C.kernels() if (e["name"], e["tile"]) == (kernel, "x".join(map(str, tile)))]
    assert plan["blocks_per_sm"] == entry["blocks_per_sm"] >= (1 if tile == (128, 256) else 2)


@pytest.mark.parametrize("sms", [16, 108, 132])
def test_a_decoding_block_takes_turns_at_rows(sms: int) -> None:
    """As many blocks as the SMs hold, whatever the rows of the weight."""
    for n in (16, 4096, 14336, 128256):
        plan = _C.plan("int8_matmul", [1, n, 4096], 1, True, sms)
        assert plan["blocks"] == min(n // 16, 2 * sms)


def test_few_blocks_share_out_k() -> None:
    """Only where SMs would have room for more blocks, and only a K that is long enough for parts."""

    def parts(m: int, n: int, k: int) -> int:
        return _C.plan("int8_matmul", [m, n, k], 1, True, 132)["parts"]

    assert parts(128, 1024, 4096) == 4  # 32 blocks; parts of 1024
    assert parts(128, 1024, 1024) == 1
    assert parts(128, 4096, 4096) == 4  # 32 large tiles
    assert parts(4096, 4096, 4096) == 1
    assert parts(1, 1024, 8192) == 2  # 64 blocks; parts of 4096
    assert parts(1, 1024, 4096) == 1
    assert parts(1, 16, 131071) == 16
    for m, n, k, sms in itertools.product((1, 16, 17, 300), (1, 64, 1000), (0, 1, 1023, 1025, 9000, 131071), (1, 132)):
        plan = _C.plan("int8_matmul", [m, n, k], 1, True, sms)
        tiles = -(-m // plan["tile"][0]) * -(-n // plan["tile"][1])
        room = plan["blocks_per_sm"] * sms
        assert plan["blocks"] == (min(tiles, room) if plan["kernel"] == "int8_decode" else tiles) * plan["parts"]
        assert plan["parts"] == 1 or plan["blocks"] <= room


@pytest.mark.parametrize(
    ("shape", "tile", "blocks"),
    [
        ((1, 32, 8, 4096, 4096, 128, 128, 0), (128, 64, 128), 32 * 32),
        ((1, 32, 8, 4096, 4096, 128, 128, 1), (64, 64, 128), 32 * 64),  # a mask needs registers
        ((2, 32, 8, 4096, 4096, 64, 64, 1), (128, 64, 64), 2 * 32 * 32),
        ((1, 4, 4, 500, 4096, 128, 128, 0), (64, 64, 128), 4 * 8),  # too few blocks for large tiles
        ((1, 12, 12, 300, 300, 64, 64, 0), (64, 64, 64), 12 * 5),
        ((8, 32, 8, 64, 4096, 128, 128, 0), (64, 64, 128), 8 * 32),  # queries that fill no large tile
        ((8, 32, 8, 65, 4096, 128, 128, 0), (128, 64, 128), 8 * 32),
        ((4, 16, 16, 1000, 1000, 64, 72, 0), (128, 64, 128), 4 * 16 * 8),
        ((1, 16, 2, 2048, 2048, 256, 256, 0), (64, 32, 256), 16 * 32),
        ((3, 2, 1, 1, 0, 16, 16, 0), (64, 64, 64), 6),
    ],
)
def test_attention(shape: tuple[int, ...], tile: tuple[int, int, int], blocks: int) -> None:
    plan = _C.plan("attention", list(shape))
    assert (plan["queries"], plan["keys"], plan["dim"]) == tile
    assert plan["blocks"] == blocks
    assert plan["blocks_per_sm"] >= 2
    assert plan["shared_bytes"] <= 99 * 1024  # of a block on compute capability 8.6
    (entry,) = [e for e in _C.kernels() if (e["name"], e["tile"]) == ("attention", "x".join(map(str, tile)))]
    assert (plan["threads"], plan["blocks_per_sm"]) == (entry["threads"], entry["blocks_per_sm"])


@pytest.mark.parametrize("capability", [86, 89, 120])
@pytest.mark.parametrize("queries", [64, 4096])
@pytest.mark.parametrize("dim", [64, 128])
def test_two_blocks_of_attention_share_an_sm_of_100_kib(dim: int, queries: int, capability: int) -> None:
    shape = [1, 32, 8, queries, 4096, dim, dim, 0]
    plan = _C.plan("attention", shape, sm_count=84, capability=capability)
    assert plan["blocks_per_sm"] >= 2
    assert plan["keys"] == (32 if dim == 128 else 64)
    assert _C.plan("attention", shape, sm_count=84, capability=80)["keys"] == 64


def test_splits_of_decode_go_by_what_an_sm_holds() -> None:
    """Long keys of few heads fill every SM, however many blocks it holds."""
    plans = [_C.plan("attention_decode", [1, 8, 4, 2**17, 128], 2, True, 100, c) for c in (80, 89, 90)]
    assert [plan["blocks_per_sm"] for plan in plans] == [2, 1, 3]
    assert all(plan["blocks"] >= 90 * plan["blocks_per_sm"] for plan in plans)


@pytest.mark.parametrize(
    ("op", "shape", "capability", "serves"),
    [
        ("attention", (1, 32, 8, 4096, 4096, 128), (8, 9), "cuda"),
        ("attention", (1, 32, 8, 4096, 4096, 128), (9, 0), "triton"),
        ("attention", (1, 32, 8, 64, 4096, 128), (9, 0), "cuda"),
        ("attention", (1, 32, 8, 4096, 4096, 128), (10, 3), "triton"),
        ("attention", (1, 32, 8, 4096, 4096, 128), (12, 0), "cuda"),  # mma.sync is all that it has
        ("int8_matmul", (65, 4096, 4096), (9, 0), "triton"),
        ("int8_matmul", (64, 4096, 4096), (9, 0), "cuda"),
        ("int8_matmul", (4096, 4096, 4096), (8, 0), "cuda"),
        ("int8_linear", (512, 4096, 4096), (10, 0), "triton"),
        ("rms_norm", (512, 4096), (9, 0), "cuda"),
    ],
)
def test_newer_tensor_cores_are_left_to_triton(op: str, shape: tuple[int, ...], capability, serves: str) -> None:
    decision = why(op, shape, dtype=torch.bfloat16, device="cuda", capability=capability)
    assert decision.served_by == serves
    (row,) = [row for row in decision.rows if row.backend == "cuda"]
    assert row.reason.startswith("gives way to triton: ") == (serves == "triton")


def test_a_row_has_one_backend_where_batches_must_not_matter(monkeypatch) -> None:
    """The order goes by the number of rows, and two backends may round differently."""
    implementations = dispatch.implementations("int8_matmul")
    call = {"a_q": torch.empty(4096, 64, dtype=torch.int8, device="meta")}
    assert [impl.backend.name for impl in in_order(implementations, call, (9, 0))][:2] == ["triton", "cuda"]
    assert in_order(implementations, call, None) == list(implementations)
    monkeypatch.setattr(settings, "batch_invariant", True)
    assert in_order(implementations, call, (9, 0)) == implementations


@pytest.mark.parametrize("head_dim", [8, 64, 72, 128, 136, 256])
def test_the_backward_of_attention(head_dim: int) -> None:
    """Each query and key is in one block; shared memory is enough of every GPU since sm_80: 99 KiB."""
    wide = head_dim > 128
    of_keys = ["attention_dk", "attention_dv"] if wide else ["attention_dkv"]
    for kernel in ("attention_row_sums", "attention_dq", *of_keys):
        plan = _C.plan(kernel, [2, 12, 4, 1000, 3000, head_dim], capability=80)
        own, step = plan["tile"]
        assert plan["blocks"] == (-(-3000 // own) * 2 * 4 if kernel in of_keys else -(-1000 // own) * 2 * 12)
        assert plan["shared_bytes"] <= 99 * 1024
        assert own % (plan["threads"] // 2) == 0  # 16 rows for each warp, or 32
        padded = 64 if head_dim <= 64 else 256 if wide else 128
        (entry,) = [e for e in _C.kernels() if (e["name"], e["tile"]) == (kernel, f"{own}x{step}x{padded}")]
        assert plan["blocks_per_sm"] == entry["blocks_per_sm"]
    with pytest.raises(ValueError, match=f"{head_dim} dimensions need no attention_d"):
        _C.plan("attention_dkv" if wide else "attention_dk", [1, 1, 1, 1, 1, head_dim])


def test_every_kernel_that_is_planned_is_in_the_table() -> None:
    table = {(kernel["name"], kernel["tile"]) for kernel in _C.kernels()}
    asked = {"norm", "quantize_int8", "activate", "activate_codes", "rope", "int8_matmul", "int8_decode"}
    assert {name for name, _ in table} >= asked
    for m in (1, 9, 17, 10**5):
        plan = _C.plan("int8_matmul", [m, 4096, 4096])
        assert (plan["kernel"], "x".join(map(str, plan["tile"]))) in table


DECODES = [(1, 8, 4), (1, 8, 64), (64, 8, 4), (3, 1, 32), (1, 2, 512)]  # batch, key heads, packed queries


@pytest.mark.parametrize(("batch", "kv_heads", "rows"), DECODES)
@pytest.mark.parametrize(("dim", "element_bytes"), [(64, 2), (128, 2), (128, 1), (256, 2), (256, 1)])
def test_decode_splits_fill_the_sms(batch: int, kv_heads: int, rows: int, dim: int, element_bytes: int) -> None:
    for keys, sms in itertools.product((1, 127, 1024, 8192, 131072), (4, 108, 132)):
        plan = _C.plan("attention_decode", [batch, kv_heads, rows, keys, dim], element_bytes, True, sms)
        tasks = batch * kv_heads * -(-rows // plan["rows"])
        assert plan["blocks"] == tasks * plan["splits"]
        assert plan["splits"] <= max(keys // 128, 1)
        if keys == 131072:  # no SM without a block, unless there are fewer blocks than the most splits give
            assert plan["blocks"] >= min(sms, 128 * tasks)
        assert plan["shared_bytes"] <= 99 * 1024  # what a block may have with compute capability 8.6
        assert plan["blocks_per_sm"] >= 2


def test_decode_does_not_split_what_fills_the_sms() -> None:
    assert _C.plan("attention_decode", [128, 8, 4, 8192, 128])["splits"] == 1


def test_bad_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing is none of norm"):
        _C.plan("nothing", [1, 1])
    with pytest.raises(ValueError, match="shape is m, n, k"):
        _C.plan("int8_matmul", [1, 1])


@pytest.mark.parametrize(
    ("op", "shape", "said"),
    [
        ("rms_norm", (4096, 4096), "norm: 4096 blocks of 128 threads, a block per row, 8 elements per access"),
        ("rms_norm", (4096, 63), "a warp per row, 1 elements per access"),
        ("layer_norm", (0, 64), "nothing is launched: there are no elements"),
        ("quantize_int8", (2, 4096), "quantize_int8: 2 blocks of 512 threads"),
        ("swiglu", (4096, 8192), "activate: 4096 blocks of 256 threads"),
        ("rope", (1, 32, 8, 100, 128), "rope: 100 blocks of 160 threads"),
        ("swiglu_quant", (4096, 8192), "activate_codes: 4096 blocks of 256 threads"),
        ("int8_linear", (4, 4096, 4096), "quantize_int8: 4 blocks of 512 threads"),
        ("int8_linear", (4, 4096, 4096), "; int8_decode: 216 blocks of 256 threads, 8x16 of the result each"),
        ("int8_matmul", (128, 1024, 4096), "3 parts of K"),
        (
            "attention_decode",
            (1, 32, 8, 1, 8192, 128),
            "attention_decode: 208 blocks of 128 threads, 16 packed queries by 64 keys a step, 26 splits of the keys",
        ),
        (
            "attention",
            (1, 32, 8, 4096, 4096, 128),
            "attention: 1024 blocks of 128 threads, 128 queries of a head each, by 64 keys of 128 dimensions, ",
        ),
        ("attention", (2, 4, 4, 0, 70, 64), "nothing is launched: there are no elements"),
        ("int8_matmul", (1, 4096, 4096), "int8_decode: 216 blocks of 256 threads, 8x16 of the result each"),
        ("gelu", (4096, 8192), "activate: 4096 blocks of 256 threads, 2 blocks on an SM at a time (on 108 SMs)"),
    ],
)
def test_why_names_the_kernel_that_would_run(op: str, shape: tuple[int, ...], said: str) -> None:
    decision = why(op, shape, dtype=torch.bfloat16, device="cuda", capability=(8, 0))
    (row,) = [row for row in decision.rows if row.backend == "cuda"]
    assert row.outcome == "chosen"
    assert said in row.reason
    if "blocks" in said:
        assert row.reason.endswith("(on 108 SMs)")


@pytest.mark.parametrize(
    ("dtype", "rows", "said"),
    [
        (torch.bfloat16, 16, "int8_decode: 216 blocks of 256 threads, 16x16"),
        (torch.bfloat16, 17, "int8_matmul: 192 blocks of 128 threads, 64x64 of the result each, 3 parts of K"),
        (torch.float16, 4096, "int8_matmul: 1024 blocks of 256 threads, 128x128 of the result each"),
        (torch.float32, 1, "x is torch.float32; with scheme w8a16 bfloat16 and float16 are taken"),
    ],
)
def test_weight_only(dtype: torch.dtype, rows: int, said: str) -> None:
    decision = why(
        "int8_linear", (rows, 4096, 4096), dtype=dtype, device="cuda", capability=(8, 0), arguments={"scheme": "w8a16"}
    )
    (row,) = [row for row in decision.rows if row.backend == "cuda"]
    assert said in row.reason
    assert "quantize_int8" not in row.reason
