"""The TPU backend beyond the contract: who asks for it, what it refuses, and the functions of JAX behind it."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys

import pytest
import torch

import llmkern
from llmkern import dispatch
from llmkern import jax as twins
from llmkern.jax import _chips
from llmkern.packed import PackedWeight
from llmkern.testing.compare import as_list, assert_same_bits
from llmkern.why import why

if importlib.util.find_spec("jax") is None:
    pytest.skip("JAX is not installed; pip install jax", allow_module_level=True)

import jax
from jax import numpy as jnp


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(0))


def test_importing_llmkern_imports_no_jax() -> None:
    code = "import sys, llmkern, llmkern.jax; llmkern.info(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_jax_there_is_a_sentence() -> None:
    code = (
        "import sys; sys.modules['jax'] = None\n"
        "import importlib.util as util; found = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'jax' else found(name, *more)\n"
        "import llmkern; print(llmkern.info().backends['tpu']['missing'])\n"
        "import llmkern.jax\n"
        "try: llmkern.jax.rms_norm\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0].startswith("JAX is not installed; pip install jax")
    assert said[1] == "llmkern.jax needs JAX, which is not installed; pip install jax (on a TPU VM: 'jax[tpu]')"


def test_serves_only_where_it_is_asked_for(x) -> None:
    assert dispatch.select("rms_norm", _call(x)).backend.name != "tpu"
    with dispatch.use_backend("tpu"):
        assert dispatch.select("rms_norm", _call(x)).backend.name == "tpu"
        found = llmkern.ops.rms_norm(x)
    torch.testing.assert_close(found, llmkern.ops.rms_norm(x))
    (impl,) = [i for i in dispatch.implementations("rms_norm") if i.backend.name == "tpu" and "cpu" in i.devices]
    assert impl.priority < 0
    assert impl.why_not(**_call(x)) == (
        "CPU tensors are taken only where use_backend('tpu') or LLMKERN_BACKEND=tpu asks for it"
    )


def test_explain_names_the_backend_and_its_blocks(x) -> None:
    class Model(torch.nn.Module):
        def forward(self, x):
            return llmkern.ops.rms_norm(x)

    with dispatch.use_backend("tpu"), torch.no_grad():
        explained = llmkern.explain(Model(), x)
    (row,) = explained
    assert row.backend == "tpu"
    assert row.about.startswith("norm on v5e: x 5×64, out 5×64; grid 1×1; VMEM 0.")
    assert row.about in str(explained)


@pytest.mark.parametrize(
    ("op", "change", "sentence"),
    [
        ("rms_norm", {"x": torch.float16}, "takes float32, bfloat16, not float16"),
        ("rms_norm", {"weight": torch.float16}, "weight is float16; float32 and bfloat16 are taken"),
    ],
)
def test_refusals(op, change, sentence, x) -> None:
    call = _call(x) | {"weight": torch.ones(64)}
    call = {name: value.to(change[name]) if name in change else value for name, value in call.items()}
    with dispatch.use_backend("tpu"), pytest.raises(dispatch.Refused, match=sentence):
        dispatch.dispatch(op, **call)


@pytest.mark.parametrize(
    ("code", "scheme", "sentence"),
    [("s4", "a8", "scheme is 'a8', expected 'a16'"), ("s6", "a16", "code is 's6', expected 's8' or 's4' or 'u4'")],
)
def test_packed_weights_that_are_refused(code, scheme, sentence, x) -> None:
    packed = PackedWeight.from_rows(code, torch.zeros(16, 64, dtype=torch.uint8), torch.ones(16, 2))
    with dispatch.use_backend("tpu"), pytest.raises(dispatch.Refused, match=sentence):
        llmkern.ops.quantized_linear(x, **packed.tensors, code=code, n=16, scheme=scheme)


def test_gradients_and_compilers_are_refused(x) -> None:
    with dispatch.use_backend("tpu"):
        with pytest.raises(dispatch.Refused, match="has no backward"):
            llmkern.ops.rms_norm(x.requires_grad_())
        with pytest.raises(Exception, match="cannot be traced by torch.compile"):
            torch.compile(llmkern.ops.rms_norm, backend="eager", fullgraph=True)(x.detach())


def test_a_result_does_not_share_what_the_caller_changes(x) -> None:
    with dispatch.use_backend("tpu"):
        found = llmkern.ops.gelu(x)
    before = found.clone()
    x.zero_()
    assert_same_bits(found, before)


def test_why_shows_blocks_vmem_grid_and_floor() -> None:
    decision = why(
        "attention", [1, 32, 8, 2048, 2048, 128], dtype=torch.bfloat16, device="tpu", chip="v5e",
        arguments={"causal": "true"},
    )  # fmt: skip
    assert decision.served_by == "tpu"
    said = _said(decision)
    assert said.startswith("attention on v5e: q 1×1×512×128, k 1×1×512×128")
    assert "grid 1×32×4×4; VMEM 5.00 of 128 MiB; at least" in said
    assert "compiled for v5e, executed by the interpreter" in decision.note


def test_why_without_a_chip_says_that_there_is_none() -> None:
    assert "JAX finds no TPU here" in _said(why("rms_norm", [4, 64], device="tpu"))


def test_why_names_the_chips() -> None:
    with pytest.raises(ValueError, match="chip is 'v9', expected v4 or v5e or v5p or v6e"):
        why("rms_norm", [4, 64], device="tpu", chip="v9")
    with pytest.raises(ValueError, match="chip is for device tpu, device is cpu"):
        why("rms_norm", [4, 64], chip="v5e")


def test_a_vmem_that_is_too_small_is_a_sentence() -> None:
    said = _said(why("rms_norm", [64, 2**20], device="tpu", chip="v4"))
    assert "of VMEM with its smallest blocks" in said
    assert "v4 has 12 MiB for a kernel" in said


def test_without_a_tpu_jax_functions_say_so() -> None:
    with pytest.raises(RuntimeError, match="JAX finds no TPU here; llmkern.jax.interpreted()"):
        twins.rms_norm(jnp.ones((4, 64)))
    with twins.interpreted():
        assert twins.rms_norm(jnp.ones((4, 64))).shape == (4, 64)


def test_arguments_are_named() -> None:
    ones = jnp.ones((4, 64))
    with twins.interpreted():
        with pytest.raises(TypeError, match="rms_norm: x is float16, expected float32 or bfloat16"):
            twins.rms_norm(ones.astype(jnp.float16))
        with pytest.raises(ValueError, match=r"rms_norm: weight has shape \[3\], expected \[64\]"):
            twins.rms_norm(ones, jnp.ones(3))
        with pytest.raises(TypeError, match="int8_matmul: w_q is float32, expected int8"):
            twins.int8_matmul(ones.astype(jnp.int8), ones)
        with pytest.raises(ValueError, match="attention: q has 3 heads, expected a multiple of k's 2"):
            twins.attention(jnp.ones((1, 3, 4, 8)), *[jnp.ones((1, 2, 4, 8))] * 2)
        cache = jnp.ones((1, 1, 32, 8))
        with pytest.raises(ValueError, match="use attention for more"):
            twins.attention_decode(jnp.ones((1, 1, 17, 8)), cache, cache, jnp.array([20]))


def test_a_gradient_is_an_error_with_a_sentence() -> None:
    with twins.interpreted(), pytest.raises(NotImplementedError, match="norm has no gradient"):
        jax.grad(lambda x: twins.rms_norm(x).sum())(jnp.ones((4, 64)))


def test_under_jit_the_bits_are_the_same() -> None:
    x = jnp.arange(256.0).reshape(4, 64)
    with twins.interpreted():
        inside = jax.jit(lambda x: twins.swiglu(twins.rms_norm(x), x))(x)
        assert_same_bits(torch.from_dlpack(inside), torch.from_dlpack(twins.swiglu(twins.rms_norm(x), x)))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: twins.rms_norm(x),
        lambda x: twins.linear(x, jnp.ones((32, 64))),
        lambda x: twins.int8_linear(x, jnp.ones((32, 64), jnp.int8), jnp.ones(32)),
        lambda x: twins.quantized_linear(
            x, jnp.ones((2, 2, 256), jnp.uint8), jnp.ones((2, 2, 16), jnp.float16), code="s4", n=32
        ),
        lambda x: twins.attention(*[x.reshape(1, 1, -1, 64)] * 3, causal=True),
    ],
    ids=["rms_norm", "linear", "int8_linear", "quantized_linear", "attention"],
)
def test_export_round_trip(call) -> None:
    """Serialised for TPUs, read again: what it needs is there, and it names the kernel."""
    from llmkern.testing.tpu_offline import lowered_for

    with lowered_for("v5e"):
        exported = jax.export.export(jax.jit(call), platforms=["tpu"])(jax.ShapeDtypeStruct((16, 64), jnp.float32))
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == ("tpu",)
    assert again.out_avals == exported.out_avals
    assert again.mlir_module() == exported.mlir_module()
    assert "tpu_custom_call" in again.mlir_module()


def test_grids_of_several_steps(monkeypatch) -> None:
    """In every dimension, with blocks so small that the arrays have several, and the last ones reach past the end."""
    blocks = _chips.Blocks(
        matmul=(32, 128, 128), packed=(32, 32, 64), attention=(32, 128), decode=128, rows=32 * 128 * 4
    )
    monkeypatch.setitem(_chips.CHIPS, "v5e", dataclasses.replace(_chips.CHIPS["v5e"], blocks=blocks))
    generator = torch.Generator().manual_seed(0)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    k, w, scale = normal(1, 1, 300, 16), codes(200, 300), normal(200).abs() / 1000
    nibbles = torch.randint(0, 16, (70, 160), generator=generator, dtype=torch.uint8)
    packed = PackedWeight.from_rows("u4", nibbles, normal(70, 5) / 8, offset=normal(70, 5))
    seq_lens, ops = torch.tensor([290]), llmkern.ops
    q, q_new, x, wide, a, rotated = (
        normal(1, 2, 70, 16),
        normal(1, 2, 3, 16),
        normal(40, 300),
        normal(100, 2100),
        codes(70, 300),
        normal(70, 16),
    )
    calls = {
        "int8_matmul": lambda: ops.int8_matmul(a, w, out_dtype=torch.int32),
        "int8_linear": lambda: ops.int8_linear(x, w, scale, scheme="w8a16"),
        "linear": lambda: ops.linear(x, wide[:, :300]),
        "quantized_linear": lambda: ops.quantized_linear(x[:, :160], **packed.tensors, code="u4", n=70, scheme="a16"),
        "attention": lambda: ops.attention(q, k, k, causal=True, window=(90, 0)),
        "attention_decode": lambda: ops.attention_decode(q_new, k, k, seq_lens, window=(140, 0)),
        "rms_norm": lambda: ops.rms_norm(wide),
        "gelu": lambda: ops.gelu(wide),
        "rope": lambda: ops.rope(q, q, rotated, rotated),
    }
    for name, call in calls.items():
        expected = call()
        with dispatch.use_backend("tpu"):
            found = call()
        pairs = zip(as_list(found), as_list(expected), strict=True)
        assert all(torch.allclose(f, e, rtol=1e-5, atol=1e-5) for f, e in pairs), name


def _said(decision) -> str:
    """Return the reason of the implementation for tensors on a TPU, which comes before that for CPU tensors."""
    return next(row.reason for row in decision.rows if row.backend == "tpu")


def _call(x: torch.Tensor) -> dict:
    return {"x": x, "weight": None, "bias": None, "eps": 1e-6, "weight_offset": 0.0}
