"""Faults to be planted into copies of csrc/cuda, by planted.py: a piece of a kernel's text that is dropped, or has
another in its place.  Every barrier, `__syncwarp()` and wait is here once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from machine import ROOT

CUDA = ROOT / "csrc" / "cuda"


@dataclasses.dataclass(frozen=True)
class Fault:
    """`piece`, which begins right at `@` of `context` (found once in the file), becomes `instead`; none: is dropped."""

    kind: str
    file: str
    context: str
    piece: str
    instead: str | None
    calls: tuple[str, ...]

    @property
    def at(self) -> tuple[int, int] | None:
        """Where the piece begins and ends in the file's text; None where the file has changed."""
        text, plain = (CUDA / self.file).read_text(), self.context.replace("@", "")
        begin = text.find(plain) + self.context.index("@")
        if text.count(plain) != 1 or not text.startswith(self.piece, begin):
            return None
        return begin, begin + len(self.piece)

    @property
    def line(self) -> int | None:
        return (CUDA / self.file).read_text()[: self.at[0]].count("\n") + 1 if self.at else None

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.piece} → {self.instead or 'nothing'}"


def _faults() -> Iterator[Fault]:
    def dropped(kind: str, file: str, context: str, piece: str, *calls: str) -> Fault:
        return Fault(kind, file, context, piece, None, calls)

    barrier, warp = "__syncthreads();", "__syncwarp();"

    file = "attention.cu"
    wait = "ptx::cp_async_wait_group<kAhead - 1>();"
    every = ("attention-64", "attention-128", "attention-128-small", "attention-256")
    held = ("attention-64", "attention-128-small", "attention-256")  # tiles that hold queries in registers
    yield dropped("wait", file, f"@{wait}\n  {barrier}\n  const uint32_t own", wait, *held)
    yield dropped("barrier", file, f"@{barrier}\n  const uint32_t own", barrier, *held)
    yield dropped("wait", file, f"@{wait}\n    {barrier}  // the keys have", wait, *every)
    yield dropped("barrier", file, f"@{barrier}  // the keys have landed", barrier, *every)
    yield dropped("wait", file, f"@{wait}\n    {barrier}  // the same", wait, *every)
    yield dropped("barrier", file, f"@{barrier}  // the same for values", barrier, *every)
    yield dropped("__syncwarp", file, f"@{warp}  // all its lanes", warp, "attention-nothing")
    yield dropped("__syncwarp", file, f"@{warp}\n  T* out = static_cast<T*>(p.out)", warp, *every)
    piece = "stage(block, of_values)"
    yield Fault("stage", file, f"kThreads>(@{piece}, static", piece, "stage(block + 1, of_values)", every[:1])
    piece = "block + kStages - 1"
    yield Fault("stage", file, f"copy(@{piece}, true", piece, "block + kStages", ("attention-64",))
    piece = "band.keys - block * kBlockN"
    yield Fault(
        "predicate", file, f"stride,\n                                         @{piece});", piece, "kBlockN", every
    )
    piece = "first_row + row < band.queries"
    yield Fault("predicate", file, f"if (@{piece} && chunk * 8 < p.value_dim)", piece, "true", every)
    piece = "chunk * 8 < p.value_dim"
    yield Fault("predicate", file, f"band.queries && @{piece})", piece, "true", ("attention-40",))
    piece = "lane % 4 == 0 && first_row + row < band.queries"
    yield Fault("predicate", file, f"if (p.lse && @{piece})", piece, "first_row + row < band.queries", every)
    piece = "column + 8 * j + e < end"
    yield Fault("predicate", file, f"&& @{piece})", piece, "column + 8 * j + e <= end", ("attention-causal",))
    piece = "Rows::offset(row, d)"
    yield Fault("swizzle", file, f"(results + @{piece} +", piece, "row * Rows::kRowBytes + d * 16", every)
    piece = "quad_sum(rows.sum[i][half])"
    yield Fault("exchange", file, f"float sum = @{piece} *", piece, "rows.sum[i][half]", every)

    file = "common/attention.cuh"
    piece = "Tile<kDim>::offset(first + r, chunk)"
    yield Fault(
        "swizzle", file, f"tile + @{piece}, from", piece, "(first + r) * Tile<kDim>::kRowBytes + chunk * 16", every
    )
    piece = "first + r < rows ? 16 : 0"
    yield Fault("predicate", file, f"from, @{piece});", piece, "16", ("attention-causal",))
    yield dropped(
        "predicate", file, "@if (chunk * 8 >= dim) rows = 0;", "if (chunk * 8 >= dim) rows = 0;", "attention-40"
    )
    piece = "row * kRowBytes + (chunk ^ (kGroup == 8 ? row % 8 : row / 2 % 4)) * 16"
    yield Fault(
        "swizzle",
        file,
        f"return @{piece};",
        piece,
        "row * kRowBytes + (chunk ^ (kGroup == 8 ? row / 2 % 8 : row / 2 % 4)) * 16",
        every,
    )

    file = "attention_decode.cu"
    wait = "ptx::cp_async_wait_group<2 * kAhead - 2>();"
    teams, team = ("decode", "decode-int8", "decode-256"), ("decode-one-team", "decode-int8-one-team")
    yield dropped("wait", file, f"@{wait}\n", wait, *teams, *team)
    yield dropped("__syncwarp", file, f"@{warp}\n    else", warp, *teams)
    yield dropped("barrier", file, f"else\n      @{barrier}", barrier, *team)
    wait = "ptx::cp_async_wait_group<0>();"
    yield dropped("wait", file, f"@{wait}\n    {barrier}", wait, *teams, *team)
    yield dropped("barrier", file, f"{wait}\n    @{barrier}", barrier, *teams, *team)
    yield dropped("barrier", file, f"@{barrier}\n    const int vectors", barrier, *teams, *team)
    yield dropped("barrier", file, f"@{barrier}\n  if (taker > 0) return;", barrier, "decode-splits")
    yield dropped("predicate", file, "@if (taker > 0) return;", "if (taker > 0) return;", "decode-splits")
    piece = "step + kAhead"
    yield Fault("stage", file, f"copy(@{piece}, false, place_of_values);", piece, "step + kAhead + 1", teams)
    piece = "row < exist ? bytes : 0"
    yield Fault("predicate", file, f"vector, @{piece});", piece, "bytes", ("decode-empty",))
    piece = "first + key >= row_end_[row]"
    yield Fault("predicate", file, f"|| @{piece})", piece, "first + key > row_end_[row]", ("decode-lengths",))
    piece = "row + 16 * values"
    yield Fault("exchange", file, f"place.vector, @{piece});", piece, "row", ("decode-strides",))

    file = "attention_backward.cu"
    wait = "ptx::cp_async_wait_group<0>();"
    every = ("backward-64", "backward-128", "backward-256")
    yield dropped("wait", file, f"@{wait}\n    {barrier}  // this step", wait, *every)
    yield dropped("barrier", file, f"@{barrier}  // this step's tiles", barrier, *every)
    yield dropped("__syncwarp", file, f"@{warp}  // all its lanes have read the tile", warp, *every)
    yield dropped("__syncwarp", file, f"@{warp}\n#pragma unroll\n  for (int at = 0;", warp, *every)
    yield dropped("barrier", file, f"@{barrier}  // nobody reads the tiles any more", barrier, "backward-mask")
    yield dropped("wait", file, f"@{wait}\n    {barrier}\n\n    float s[1]", wait, "backward-mask")
    yield dropped("barrier", file, f"{wait}\n    @{barrier}\n\n    float s[1]", barrier, "backward-mask")
    yield dropped("barrier", file, f"@{barrier}\n#pragma unroll\n  for (int j = 0;", barrier, "backward-mask")
    yield dropped("barrier", file, f"@{barrier}\n  const int rows = one_row", barrier, "backward-mask")
    piece = "(step + 1) % 2"
    yield Fault("stage", file, f"copy_walked(@{piece}, following)", piece, "step % 2", every)
    piece = "row < rows"
    yield Fault("predicate", file, f"if (@{piece} && chunk * 8 < dim)", piece, "true", every)
    piece = "lane % 4 != 0"
    yield Fault("predicate", file, f"if (@{piece} || own_row", piece, "false", ("backward-no-lse",))
    yield dropped("predicate", file, "@if (lane > 0) return;", "if (lane > 0) return;", "backward-64")
    piece = "Rows::offset(row, chunk)"
    yield Fault("swizzle", file, f"(tile + @{piece}));", piece, "row * Rows::kRowBytes + chunk * 16", every)

    file = "int8_matmul.cu"
    wait = "ptx::cp_async_wait_group<kTile.stages - 2>();"
    every = ("int8-small", "int8-large", "int8-wide", "int8-halves", "int8-halves-small")
    yield dropped("wait", file, f"@{wait}\n", wait, *every)
    yield Fault("wait", file, f"@{wait}\n", wait, "ptx::cp_async_wait_group<kTile.stages - 1>();", every)
    yield dropped("barrier", file, f"@{barrier}  // this step's tiles", barrier, *every)
    yield dropped("barrier", file, f"@{barrier}  // the last tiles", barrier, *every)
    yield dropped("__syncwarp", file, f"@{warp}\n    store_slab", warp, *every)
    yield dropped("__syncwarp", file, f"i * 16, first_n + warp_n);\n    @{warp}", warp, "int8-large", "int8-wide")
    yield dropped("barrier", file, f"@{barrier}\n    for (int element", barrier, "int8-decode")
    yield dropped("barrier", file, f"@{barrier}  // the sums have been read", barrier, "int8-decode")
    piece = "swizzled<kRowBytes>(row_of(i), chunk)"
    yield Fault("swizzle", file, f"tile + @{piece};", piece, "(row_of(i) * kRowBytes + chunk * kChunk)", every)
    piece = "4 * half + 2 * k + lane % 4 / 2"
    yield Fault("swizzle", file, f"+ row, @{piece});", piece, "4 * half + 2 * k + lane % 4 % 2", ("int8-halves",))
    yield Fault("stage", file, "stage = shared + @into *", "into", "next(into)", every)
    piece = "step + i < whole_steps"
    yield Fault("stage", file, f"if (@{piece}) {{", piece, "step + i <= whole_steps", ("int8-decode-long",))
    piece = "ahead_n < end_n ? 0 : whole_steps"
    yield Fault("predicate", file, f"ahead_step = @{piece};", piece, "whole_steps", ("int8-decode-long",))
    piece = "valid < 0 ? 0 : valid < kChunk ? valid : kChunk"
    yield Fault("predicate", file, f"step), @{piece});", piece, "valid > 0 ? kChunk : 0", ("int8-tail",))
    piece = "m + row >= p.a_rows.count"
    yield Fault("predicate", file, f"if (@{piece}) break;", piece, "false", every)
    piece = "m >= p.a_rows.count || n >= p.n"
    yield Fault("predicate", file, f"if (@{piece}) continue;", piece, "n >= p.n", ("int8-decode",))

    file = "common/reduce.cuh"
    rows = ("layer_norm", "rms_norm_quant")
    yield dropped("barrier", file, f"@{barrier}\n    value = bits_as", barrier, *rows)
    yield dropped("stage", file, "@buffer_ += next_;", "buffer_ += next_;", *rows)

    piece = "inside && threadIdx.x == 0"
    yield Fault("predicate", "norm.cu", f"if (@{piece}) st_global(p.scale", piece, "inside", rows[1:])
    yield Fault(
        "predicate", "quantize_int8.cu", f"if (@{piece}) st_global(p.scale", piece, "inside", ("quantize_int8",)
    )
    piece = "first + threadIdx.y"
    yield Fault("blocks", "norm.cu", f"row = @{piece};", piece, "first + threadIdx.y / 2", ("warp-rows",))
    piece = "static_cast<int64_t>(blockIdx.x) * blockDim.y"
    yield Fault(
        "blocks", "norm.cu", f"first = @{piece};", piece, "static_cast<int64_t>(blockIdx.x) * (blockDim.y - 1)",
        ("warp-rows",),
    )  # fmt: skip

    file = "norm_backward.cu"
    yield dropped("barrier", file, f"@{barrier}\n  if (column >= p.hidden", barrier, "norm_backward")
    piece = "column >= p.hidden || threadIdx.y > 1"
    yield Fault("predicate", file, f"if (@{piece}) return;", piece, "column >= p.hidden", ("norm_backward",))
    piece = "2 * blockIdx.x * p.hidden"
    yield Fault("blocks", file, f"p.workspace + @{piece};", piece, "blockIdx.x * p.hidden", ("norm_backward",))
    piece = "work % units"
    yield Fault("blocks", "rope.cu", f"unit = @{piece},", piece, "work / 2 % units", ("rope",))

    file = "attention_decode.cu"
    piece = "(top_[i] - finite_shift(top[i])) * scale_.log2_unit"
    contracted = "top_[i] * scale_.log2_unit - finite_shift(top[i]) * scale_.log2_unit"
    yield Fault("contraction", file, f"ex2_approx_ftz(@{piece})", piece, contracted, ("decode-equal",))


FAULTS = list(_faults())
