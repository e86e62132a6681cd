"""Schemes, filters and the report, as a user meets them."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import llmkern
from llmkern.quantization import Int8, quantize_
from llmkern.quantization.schemes import scheme_from_dict, scheme_to_dict


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


def test_a_string_stands_for_a_scheme() -> None:
    first, second = quantize_(model(), "int8"), quantize_(model(), Int8())
    assert llmkern.report(first) == llmkern.report(second)
    weight_only = llmkern.report(quantize_(model(), Int8(max_error=0))).quantization
    assert {row.action for row in weight_only} == {"int8 weight-only"}


def test_schemes_are_values_that_json_carries() -> None:
    scheme = Int8(max_error=0.5, smooth=False)
    assert scheme == Int8(0.5, False) != Int8()
    assert hash(scheme) == hash(Int8(0.5, False))
    assert scheme_from_dict(json.loads(json.dumps(scheme_to_dict(scheme)))) == scheme
    with pytest.raises(ValueError, match="quantization_config: .*unexpected keyword argument 'bits'"):
        scheme_from_dict({"scheme": "int8", "bits": 7})
    with pytest.raises(ValueError, match="quantization_config: scheme is 'int3', expected 'int8' or 'int4'"):
        scheme_from_dict({"scheme": "int3"})
    for wrong in (-1, float("nan"), "much"):
        with pytest.raises(ValueError, match="Int8: max_error is .*, expected a number that is 0 or more"):
            Int8(max_error=wrong)


def test_a_filter_takes_the_module_and_its_path_as_torchao_s_does() -> None:
    seen = []
    small = quantize_(model(), filter_fn=lambda module, path: seen.append((type(module), path)) or path == "2")
    assert seen == [(nn.Linear, "0"), (nn.Linear, "2")]
    assert [row.path for row in llmkern.report(small).quantization.quantized] == ["2"]
    with pytest.warns(UserWarning, match="filter_fn is false for every layer; nothing is quantized") as warned:
        quantize_(model(), filter_fn=lambda module, path: False)
    assert warned[0].filename == __file__


def test_what_was_left_can_be_quantized_later_and_nothing_twice() -> None:
    small = quantize_(model(), skip=["0"])
    before = llmkern.report(small).quantization
    quantize_(small)
    report = llmkern.report(small).quantization
    assert sorted(row.path for row in report.quantized) == ["0", "2"]
    assert report.bytes_before == before.bytes_before
    with pytest.raises(ValueError, match=r"quantize_: model is quantized already \(0 is an Int8Linear\)"):
        quantize_(small)


def test_the_report_is_there_at_any_time() -> None:
    plain = model()
    assert llmkern.report(plain).quantization is None
    assert llmkern.report(plain).to_dict() == {}
    assert str(llmkern.report(plain)) == "llmkern has changed nothing in this model"
    report = llmkern.report(quantize_(plain))
    assert "2 of 2 layers int8" in str(report)
    assert report.to_dict()["quantization"]["rows"][0]["path"] == "0"
    for carried in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain)), nn.Sequential(plain)):
        assert len(llmkern.report(carried).quantization.quantized) == 2
    assert llmkern.report(nn.Sequential(plain)).quantization.rows[0].path == "0.0"
    llmkern.dequantize_(plain)
    assert llmkern.report(plain).quantization is None
    with pytest.raises(TypeError, match="report: model is a str, expected a torch.nn.Module"):
        llmkern.report("model")


def test_importing_llmkern_imports_no_transformers() -> None:
    code = "import sys, llmkern; assert 'transformers' not in sys.modules; llmkern.Int8Config(max_error=0)"
    subprocess.run([sys.executable, "-c", code], check=True)
