"""What every format of packed weights keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmkern.nn import Int8Linear, PackedEmbedding, PackedLinear
from llmkern.quantization.formats import Format, format_of_group, format_of_module, formats
from llmkern.quantization.formats._awaiting import Awaiting
from llmkern.quantization.formats.blocks import pack_groups
from llmkern.testing.compare import assert_same_bits

WRITTEN = [form for form in formats() if form.takes is not None]


def module_of(form: Format, linear: nn.Linear) -> nn.Module:
    if form.name == "int8":
        return Int8Linear.from_linear(linear)
    return PackedLinear.from_linear(linear, pack_groups(linear.weight.detach()))


def table_of(form: Format, module: nn.Module) -> nn.Module | None:
    """The embedding whose codes an output head of this format shares."""
    if form.name != "int-quantized groups":
        return None
    return PackedEmbedding.tied(nn.Embedding(*module.weight_size), module)


@pytest.mark.parametrize("form", WRITTEN, ids=lambda form: form.name)
def test_packing_and_reading_back(form: Format) -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    tensors = form.pack(weight)
    unpacked = form.unpack(tensors)
    assert (unpacked.dtype, unpacked.shape) == (torch.float32, weight.shape)
    assert (unpacked - weight).norm() < 0.2 * weight.norm()
    assert_same_bits(form.unpack(form.pack(unpacked)), unpacked)  # a fixed point


@pytest.mark.parametrize("form", WRITTEN, ids=lambda form: form.name)
def test_a_module_holds_what_pack_gives_and_shows_what_unpack_means(form: Format) -> None:
    linear = nn.Linear(32, 8, bias=False)
    group = form.group(module_of(form, linear))
    module = form.empty("a.layer", linear, group)
    tensors = form.pack(linear.weight.detach())
    module.load_state_dict(tensors, strict=True, assign=True)
    if isinstance(module, Awaiting):
        module = module.finish()
    else:
        module._parameters["_floating"] = nn.Parameter(torch.empty(0), requires_grad=False)
    assert isinstance(module, nn.Linear)
    assert_same_bits(module.weight.clone(), form.unpack(tensors))
    if form.write is not None:
        assert_same_bits([t.float() for t in form.write(module).values()], [t.float() for t in tensors.values()])
    table = table_of(form, module)
    assert format_of_module(module) is form
    assert table is None or format_of_module(table) is form
    assert format_of_module(linear) is None
    assert form.refuse(group) is None
    assert format_of_group(group) is form
    with pytest.raises(ValueError, match="a.layer is .* and a LayerNorm in the model"):
        form.empty("a.layer", nn.LayerNorm(4), group)


def test_a_group_that_nobody_reads_is_refused_with_every_reason() -> None:
    group = {"weights": {"num_bits": 3, "type": "int"}, "input_activations": None}
    with pytest.raises(ValueError, match="llmkern reads none such .*int8: its weights have num_bits 3, expected 8"):
        format_of_group(group)
