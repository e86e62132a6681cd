"""Formats of packed weights against the unpackers of those who publish them, and the layout against its definition."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from torch import Tensor

from llmkern.packed import BLOCK, CODES, PANEL, from_panels, to_panels
from llmkern.quantization.formats import blocks
from llmkern.quantization.formats.blocks import pack_groups, pack_int8_blocks
from llmkern.quantization.formats.gguf import GGUF_TYPES
from llmkern.quantization.formats.packed_int32 import (
    read_awq,
    read_gptq,
    read_pack_quantized,
    write_pack_quantized,
)
from llmkern.testing.case import Make
from llmkern.testing.cases.quantized_linear import KINDS, random_packed
from llmkern.testing.compare import assert_same_bits


def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_random_blocks_mean_what_gguf_says(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    form = GGUF_TYPES[name]
    theirs = gguf.GGMLQuantizationType[name]
    assert (theirs.value, *gguf.GGML_QUANT_SIZES[theirs]) == (form.number, form.columns, form.nbytes)
    blocks = integers(0, 256, 21, 3, form.nbytes, dtype=torch.uint8)
    expected = torch.from_numpy(gguf.dequantize(blocks.reshape(21, -1).numpy(), theirs).astype(np.float32))
    packed = form.read(blocks)
    assert (packed.n, packed.k) == expected.shape
    assert_same_bits(packed.dequantized(), expected)  # NaN and infinite scales too


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("n", [1, PANEL, 37])
def test_panels_hold_every_code_in_as_many_bits(code: str, n: int) -> None:
    bits = CODES[code].bits
    codes = integers(0, 1 << bits, n, 3 * BLOCK, dtype=torch.uint8)
    panels = to_panels(codes, code)
    assert panels.shape == (-(-n // PANEL), 3, PANEL * BLOCK * bits // 8)
    assert torch.equal(from_panels(panels, code, n), codes)
    # The first line has the first four columns of each row.
    line = panels[0, 0, :64].view(PANEL, 4)[:n] & (255 if bits == 8 else 15)
    assert torch.equal(line, codes[:PANEL, :4] & (255 if bits == 8 else 15))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_back(kind: str) -> None:
    packed = random_packed(Make(torch.float32, "cpu", 0), kind, 37, 512)
    rows = {name: packed.rows(name) for name in packed.tensors}
    again = type(packed).from_rows(packed.code, **rows)
    for name, tensor in packed.tensors.items():
        assert_same_bits(again.tensors[name], tensor)
    assert_same_bits(torch.cat([packed.panels(i, i + 1).dequantized() for i in range(3)]), packed.dequantized())


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (5, True), (6, True), (8, True)])
@pytest.mark.parametrize("actorder", [False, True])
def test_pack_quantized_means_what_compressed_tensors_says(bits: int, symmetric: bool, actorder: bool) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    n, k, group = 37, 256, 64
    half = 1 << bits - 1
    codes = integers(-half, half, n, k, dtype=torch.int8)
    zero = torch.zeros(n, k // group, dtype=torch.int8) if symmetric else integers(-half, half, n, 4, dtype=torch.int8)
    scale = torch.rand(n, k // group, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.01
    g_idx = torch.arange(k) // group
    if actorder:
        g_idx = g_idx[torch.randperm(k, generator=torch.Generator().manual_seed(1))]
    tensors = {"weight_packed": pack_to_int32(codes, bits), "weight_scale": scale, "weight_shape": torch.tensor([n, k])}
    if not symmetric:
        tensors["weight_zero_point"] = pack_to_int32(zero, bits, packed_dim=0)
    tensors |= {"weight_g_idx": g_idx.int()} if actorder else {}
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=group)
    order = torch.argsort(g_idx, stable=True)
    expected = dequantize(codes[:, order], scale, zero, args)
    packed, permutation = read_pack_quantized(tensors, bits)
    assert permutation is None if not actorder else torch.equal(permutation, order)
    assert_same_bits(packed.dequantized(), expected.float())
    if not actorder:  # what we write is what they wrote
        again = write_pack_quantized(packed)
        assert again.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(again[name], tensor), name


def test_awq_means_what_compressed_tensors_says() -> None:
    pytest.importorskip("compressed_tensors")
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    converter = converters.AutoAWQConverter
    k, n, group = 128, 48, 64
    qweight, qzeros = integers(-(2**31), 2**31 - 1, k, n // 8), integers(-(2**31), 2**31 - 1, k // group, n // 8)
    scales = torch.rand(k // group, n, generator=torch.Generator().manual_seed(0)).half()
    codes, zeros = converter.reverse_awq_order(*converter.unpack_awq(qweight, qzeros, 4), 4)
    codes, zeros = codes.int() & 15, zeros.int() & 15
    spread = [t.float().repeat_interleave(group, 0) for t in (zeros, scales)]
    expected = ((codes - spread[0]) * spread[1]).T
    packed, permutation = read_awq({"qweight": qweight, "qzeros": qzeros, "scales": scales})
    assert permutation is None
    assert_same_bits(packed.dequantized(), expected.contiguous())


@pytest.mark.skipif(importlib.util.find_spec("auto_round") is None, reason="auto-round is not installed")
def test_awq_means_what_auto_round_says() -> None:
    from auto_round.export.export_to_awq.utils import dequantize_gemm

    k, n, group = 128, 48, 64
    qweight, qzeros = integers(-(2**31), 2**31 - 1, k, n // 8), integers(-(2**31), 2**31 - 1, k // group, n // 8)
    scales = torch.rand(k // group, n, generator=torch.Generator().manual_seed(0)).half().float()
    packed, _ = read_awq({"qweight": qweight, "qzeros": qzeros, "scales": scales})
    assert_same_bits(packed.dequantized(), dequantize_gemm(qweight, qzeros, scales, 4, group).T.contiguous())


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("actorder", [False, True])
def test_gptq_means_what_its_formula_says(version: int, actorder: bool) -> None:
    """weight[n, k] = scales[g, n] · (q[n, k] − zero[g, n]); eight rows of k to a word, the first in its lowest bits."""
    k, n, group = 128, 24, 32
    q = integers(0, 16, n, k)
    zero = integers(1, 17, k // group, n) if version == 1 else integers(0, 16, k // group, n)
    scales = torch.rand(k // group, n, generator=torch.Generator().manual_seed(0)).half()
    g_idx = torch.arange(k) // group
    if actorder:
        g_idx = g_idx[torch.randperm(k, generator=torch.Generator().manual_seed(1))]

    def words(values: Tensor) -> Tensor:  # [..., 8m] → [..., m]
        total = (values.long().unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1)
        return torch.where(total >= 2**31, total - 2**32, total).int()

    tensors = {"qweight": words(q).T, "qzeros": words(zero - (2 - version)), "scales": scales, "g_idx": g_idx.int()}
    expected = scales.float()[g_idx].T * (q - zero[g_idx].T)
    packed, permutation = read_gptq(tensors, 4, version=version)
    got = packed.dequantized()
    if permutation is not None:
        got = torch.empty_like(got).index_copy(1, permutation, got)
    assert (permutation is not None) == actorder
    assert_same_bits(got, expected.contiguous())


@pytest.mark.skipif(importlib.util.find_spec("auto_round") is None, reason="auto-round is not installed")
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_means_what_auto_round_says(version: int) -> None:
    if version == 1:
        from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
    else:
        from auto_round_extension.torch.qlinear_torch import QuantLinear
    k, n, group = 128, 24, 32
    layer = QuantLinear(4, group, k, n, bias=False)
    layer.qweight = integers(-(2**31), 2**31 - 1, k // 8, n)
    layer.qzeros = integers(-(2**31), 2**31 - 1, k // group, n // 8)
    layer.scales = torch.rand(k // group, n, generator=torch.Generator().manual_seed(0)).half()
    expected = layer.float()(torch.eye(k)).T.detach()
    tensors = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}
    packed, _ = read_gptq(tensors, 4, version=version)
    torch.testing.assert_close(packed.dequantized(), expected.float(), rtol=1e-3, atol=1e-3)


def gptq() -> dict[str, Tensor]:
    return {
        "qweight": integers(-(2**31), 2**31 - 1, 16, 24),
        "qzeros": integers(-(2**31), 2**31 - 1, 4, 3),
        "scales": torch.rand(4, 24),
        "g_idx": torch.arange(128, dtype=torch.int32) // 32,
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scales": None}, "scales is missing, expected g_idx, qweight, qzeros and it"),
        ({"scales": torch.rand(4, 23)}, r"scales has shape \[4, 23\], expected \[groups, 24\]"),
        ({"scales": torch.rand(24)}, "scales has 1 dimensions, expected 2"),
        ({"scales": torch.full((4, 24), float("nan"))}, "scales have NaN or infinite values"),
        ({"qzeros": torch.zeros(4, 2, dtype=torch.int32)}, r"qzeros has shape \[4, 2\], expected \[4, 3\]"),
        ({"g_idx": torch.zeros(128, dtype=torch.int32)}, "g_idx does not have 32 columns for each of 4 groups"),
        ({"g_idx": torch.zeros(8, dtype=torch.int32)}, r"g_idx has shape \[8\], expected \[128\]"),
        (
            {"scales": torch.rand(3, 24), "qzeros": torch.zeros(3, 3, dtype=torch.int32)},
            "3 groups of K = 128 columns; groups that are multiples of 32 columns are accepted",
        ),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor | None], says: str) -> None:
    tensors = {name: value for name, value in (gptq() | change).items() if value is not None}
    with pytest.raises(ValueError, match=says):
        read_gptq(tensors, 4, version=1)
    with pytest.raises(ValueError, match="version of the zero points is 3, expected 1 or 2"):
        read_gptq(gptq(), 4, version=3)
    with pytest.raises(ValueError, match="codes have 3 bits, expected 4 or 8"):
        read_gptq(gptq(), 3, version=1)


def weights(n: int = 33, k: int = 256) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02


def error(packed: Tensor, weight: Tensor) -> float:
    return float((packed - weight).norm() / weight.norm())


def test_int8_blocks_are_ggufs() -> None:
    gguf = pytest.importorskip("gguf")
    theirs = gguf.quantize(weights().numpy(), gguf.GGMLQuantizationType.Q8_0)
    expected = GGUF_TYPES["Q8_0"].read(torch.from_numpy(theirs).view(33, 8, 34))
    ours = pack_int8_blocks(weights())
    assert_same_bits(ours.scale, expected.scale)
    # They round by the scale before it is rounded to fp16: codes next to a tie may differ.
    steps = (ours.rows("codes").int() - expected.rows("codes").int()).abs()
    assert int(steps.max()) <= 1
    assert error(ours.dequantized(), weights()) <= 1.001 * error(expected.dequantized(), weights())


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (5, True), (6, True)])
def test_searched_scales_beat_those_of_the_largest_value(group: int, bits: int, symmetric: bool) -> None:
    half = 1 << bits - 1
    weight = weights()
    groups = weight.unflatten(1, (-1, group))
    if symmetric:
        scale = groups.abs().amax(-1, keepdim=True) / (half - 1)
        plain = (groups / scale).round().clamp(-half, half - 1) * scale
    else:
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = (high - low) / 15
        zero = (-low / scale).round()
        plain = ((groups / scale + zero).round().clamp(0, 15) - zero) * scale
    packed = pack_groups(weight, group, bits=bits, symmetric=symmetric)
    assert packed.scale.shape == (3, 256 // group, PANEL)
    assert error(packed.dequantized(), weight) < 0.97 * error(plain.flatten(1), weight)


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_a_grid_is_found_again(bits: int, monkeypatch) -> None:
    half = 1 << bits - 1
    grid = torch.randint(-half, half, (16, 64), generator=torch.Generator().manual_seed(0)).float()
    grid[:, ::32] = -half
    packed = pack_groups(grid * 0.25, bits=bits)
    assert_same_bits(packed.dequantized(), grid * 0.25)
    monkeypatch.setattr(blocks, "AT_ONCE", 192)  # three rows at a time
    assert_same_bits(pack_groups(grid * 0.25, bits=bits).codes, packed.codes)


def test_zeros_stay_zeros() -> None:
    assert pack_groups(torch.zeros(4, 32)).dequantized().eq(0).all()
    assert pack_int8_blocks(torch.zeros(4, 32)).dequantized().eq(0).all()


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e9])
@pytest.mark.parametrize("pack", [pack_int8_blocks, pack_groups, lambda w: pack_groups(w, symmetric=False)])
def test_the_size_of_a_weight_does_not_matter(pack, size: float) -> None:
    scaled = error(pack(weights() * size).dequantized() / size, weights())
    assert abs(scaled - error(pack(weights()).dequantized(), weights())) < 1e-3


@pytest.mark.parametrize("pack", [pack_int8_blocks, pack_groups, lambda w: pack_groups(w, symmetric=False)])
def test_weights_that_cannot_be_packed_are_refused(pack) -> None:
    with pytest.raises(ValueError, match=r"weight of shape \[4, 48\]: its 48 columns are no multiple of 32"):
        pack(torch.ones(4, 48))
    with pytest.raises(ValueError, match="weight has NaN or infinite values, expected finite ones"):
        pack(torch.full((4, 32), float("nan")))
    with pytest.raises(ValueError, match="group is 48, expected 32, 64 or 128"):
        pack_groups(torch.ones(4, 48), 48)
