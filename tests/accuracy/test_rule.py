"""The accuracy rule itself: it convicts planted inaccuracies, and acquits whatever rounds as the definition does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.testing.case import Call, Make
from llmkern.testing.cases.attention import plain_call
from llmkern.testing.compare import assert_as_accurate, ulp, upcast
from llmkern.testing.judge import assert_accurate, reference, spreads_of

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def linear_call(dtype: torch.dtype, rows: int = 24, n: int = 40, k: int = 1536) -> Call:
    make = Make(dtype, "cpu", seed=0)
    return {"x": make.randn(rows, k), "weight": make.randn(n, k, scale=k**-0.5), "bias": None, "activation": "none"}


def norm_call(dtype: torch.dtype, rows: int = 16, hidden: int = 512, mean: float = 0.0) -> Call:
    make = Make(dtype, "cpu", seed=0)
    call = {"x": make.randn(rows, hidden, offset=mean), "weight": make.randn(hidden), "bias": make.randn(hidden)}
    return call | {"eps": 1e-6}


def rms_call(dtype: torch.dtype, rows: int = 16, hidden: int = 512) -> Call:
    return norm_call(dtype, rows, hidden) | {"bias": None, "weight_offset": 0.0}


def attention_call(dtype: torch.dtype, scale: float = 1.0) -> Call:
    make = Make(dtype, "cpu", seed=0)
    return plain_call(make.randn(1, 2, 40, 64, scale=scale), *(make.randn(1, 2, 70, 64, scale=scale) for _ in "kv"))


def int8_call(dtype: torch.dtype) -> Call:
    make = Make(dtype, "cpu", seed=0)
    codes = make.randint(-127, 128, 40, 512, dtype=torch.int8)
    call = {"x": make.randn(24, 512), "w_q": codes, "w_scale": make.randn(40, 1, dtype=FP32).abs() * 1e-3}
    return call | {"bias": None, "activation": "none", "scheme": "w8a16"}


def gelu_call(dtype: torch.dtype) -> Call:
    return {"x": Make(dtype, "cpu", seed=0).randn(1000, 1000, scale=2.0), "approximate": "none"}


def summed(terms: Tensor, dtype: torch.dtype, step: int = 16) -> Tensor:
    """Sum over the last dimension with an accumulator in `dtype`, `step` terms at a time."""
    total = torch.zeros(terms.shape[:-1], dtype=dtype)
    for part in terms.split(step, -1):
        total = (total.float() + part.float().sum(-1)).to(dtype)
    return total


def linear_accumulating_in_bf16(call: Call) -> Tensor:
    return summed(call["x"].float()[:, None] * call["weight"].float(), BF16).to(call["x"].dtype)


def linear_of_rounded_operands(bits: int) -> Callable[[Call], Tensor]:
    """Products of operands with `bits` bits of mantissa, as tensor cores in TF32 (10) and bf16 (7) take them."""

    def rounded(x: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2 ** (bits + 1)).round() / 2 ** (bits + 1), exponent)

    return lambda call: F.linear(rounded(call["x"]), rounded(call["weight"]))


def layer_norm_by_difference_of_squares(call: Call) -> Tensor:
    x = call["x"].float()
    mean = x.mean(-1, keepdim=True)
    variance = x.square().mean(-1, keepdim=True) - mean.square()
    return (x - mean) * torch.rsqrt(variance + call["eps"]) * call["weight"] + call["bias"]


def rms_norm_rounded_before_the_weight(call: Call) -> Tensor:
    unit = {"weight": torch.ones_like(call["weight"])}
    return reference("rms_norm", call | unit) * call["weight"]


def one_element_two_ulps_off(op: str) -> Callable[[Call], Tensor]:
    def spoil(call: Call) -> Tensor:
        out = reference(op, call)
        at = out.numel() // 3
        out.view(-1)[at] += 2 * ulp(out.view(-1)[at], out.dtype).to(out.dtype)
        return out

    return spoil


def truncated(op: str) -> Callable[[Call], Tensor]:
    def cut(call: Call) -> Tensor:
        wide = reference(op, upcast(call)).float()
        return (wide.view(torch.int32) & ~0xFFFF).view(FP32).to(BF16)

    return cut


def scores(call: Call) -> Tensor:
    return call["q"].float() @ call["k"].float().mT * call["sm_scale"]


def softmax_without_its_maximum(call: Call) -> Tensor:
    weights = scores(call).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ call["v"]


def softmax_by_a_short_polynomial(call: Call) -> Tensor:
    """2^x from a cubic: right to 1e-4, enough for bf16 and far too little for fp32."""
    s = scores(call)
    t = (s - s.amax(-1, keepdim=True)) * 1.4426950408889634
    f = t - t.floor()
    weights = torch.ldexp(1 + f * (0.6951786 + f * (0.2276144 + f * 0.0772070)), t.floor())
    return (weights / weights.sum(-1, keepdim=True)) @ call["v"]


def attention_with_scores_in_16_bits(call: Call) -> Tensor:
    return (scores(call).to(call["q"].dtype).float().softmax(-1) @ call["v"].float()).to(call["q"].dtype)


def int8_linear_with_a_scale_in_fp16(call: Call) -> Tensor:
    return reference("int8_linear", call | {"w_scale": call["w_scale"].half().float()})


def gelu_by_tanh(call: Call) -> Tensor:
    return F.gelu(call["x"].float(), approximate="tanh").to(call["x"].dtype)


@dataclass(frozen=True)
class Plant:
    op: str
    call: Call
    fault: Callable[[Call], Tensor]
    name: str

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"


PLANTS = [
    Plant("linear", linear_call(FP32), linear_accumulating_in_bf16, "accumulates in bf16, fp32"),
    Plant("linear", linear_call(BF16), linear_accumulating_in_bf16, "accumulates in bf16, bf16"),
    Plant("linear", linear_call(FP32), linear_of_rounded_operands(10), "operands in TF32"),
    Plant("linear", linear_call(FP32), linear_of_rounded_operands(7), "operands in bf16"),
    Plant("linear", linear_call(BF16, 1000, 1000, 64), one_element_two_ulps_off("linear"), "1 of 10⁶ 2 ulps off"),
    Plant("gelu", gelu_call(FP16), one_element_two_ulps_off("gelu"), "1 of 10⁶ 2 ulps off"),
    Plant("rms_norm", rms_call(BF16, 1000, 1000), one_element_two_ulps_off("rms_norm"), "1 of 10⁶ 2 ulps off"),
    Plant("rms_norm", rms_call(BF16), truncated("rms_norm"), "truncates instead of rounding"),
    Plant("rms_norm", rms_call(BF16), rms_norm_rounded_before_the_weight, "rounds before the weight"),
    Plant("layer_norm", norm_call(FP32, mean=300.0), layer_norm_by_difference_of_squares, "variance uncompensated"),
    Plant("attention", attention_call(FP32, scale=8.0), softmax_without_its_maximum, "softmax without its maximum"),
    Plant("attention", attention_call(FP32), softmax_by_a_short_polynomial, "exp from a cubic"),
    Plant("attention", attention_call(BF16, scale=2.0), attention_with_scores_in_16_bits, "scores in bf16"),
    Plant("int8_linear", int8_call(FP32), int8_linear_with_a_scale_in_fp16, "scale in fp16"),
    Plant("gelu", gelu_call(FP32), gelu_by_tanh, "tanh instead of erf"),
    Plant("gelu", gelu_call(BF16), gelu_by_tanh, "tanh instead of erf, bf16"),
]


def judge(op: str, call: Call, out: Tensor) -> None:
    """The rule for the first output, beside a PyTorch that is right to the last bit: luck is of no help."""
    exact = reference(op, upcast(call))
    spreads = spreads_of(op, call, exact)
    exact = exact[0] if isinstance(exact, tuple) else exact
    assert_as_accurate(out, baseline=exact.to(out.dtype), exact=exact, spreads=spreads[:1])


@pytest.mark.parametrize("plant", PLANTS, ids=str)
def test_a_planted_inaccuracy_is_convicted(plant: Plant) -> None:
    honest = reference(plant.op, plant.call)
    judge(plant.op, plant.call, honest[0] if isinstance(honest, tuple) else honest)
    with pytest.raises(AssertionError):
        judge(plant.op, plant.call, plant.fault(plant.call))


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "one after the other": lambda terms: summed(terms, FP32, 1),
    "backwards": lambda terms: summed(terms.flip(-1), FP32, 1),
    "in 16 lanes": lambda terms: summed(terms.unflatten(-1, (-1, 16)).mT, FP32, 1).sum(-1),
    "in blocks of 384": lambda terms: summed(terms, FP32, 384),
    "largest first": lambda terms: summed(terms.gather(-1, terms.abs().argsort(-1, descending=True)), FP32, 1),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_every_order_of_summation_in_fp32_is_acquitted(order: str, dtype: torch.dtype) -> None:
    """Processors differ in little else, and PyTorch's error on one of them is no measure of another's."""
    for k in (1, 17, 577, 1536):
        call = linear_call(dtype, k=k)
        terms = F.pad(call["x"].float()[:, None] * call["weight"].float(), (0, -k % 16))
        judge("linear", call, ORDERS[order](terms).to(dtype))


def test_positive_terms_lose_no_more_than_the_bound() -> None:
    """Sums of squares: every partial sum is as large as it can be."""
    call = rms_call(FP32, hidden=4096)
    x = call["x"]
    mean = summed(x.square(), FP32, 8)[:, None] / x.shape[-1]
    judge("rms_norm", call, x * torch.rsqrt(mean + call["eps"]) * call["weight"])


def test_where_pytorch_rounds_in_between_twice_its_error_is_accepted() -> None:
    """RoPE composed in bf16 rounds products and sum; a kernel may do so too, but no worse."""
    make = Make(BF16, "cpu", seed=0)
    angle = torch.outer(torch.arange(30.0), 1e4 ** -torch.linspace(0, 1, 32)).repeat(1, 2)
    call = {"q": make.randn(1, 4, 30, 64), "k": make.randn(1, 2, 30, 64), "interleaved": False, "rotary_dim": 64}
    call |= {"cos": angle.cos()[None].to(BF16), "sin": angle.sin()[None].to(BF16)}
    composed = [
        x * call["cos"][:, None] + torch.cat([-x[..., 32:], x[..., :32]], -1) * call["sin"][:, None]
        for x in (call["q"], call["k"])
    ]
    assert_accurate("rope", call, composed)
    with pytest.raises(AssertionError, match="PyTorch's is .*, so .* is allowed"):
        assert_accurate("rope", call, [composed[0] * 1.05, composed[1]])


def test_what_overflows_the_dtype_is_infinite_or_its_largest_number() -> None:
    x = torch.tensor([60000.0, 70000.0, -1e6, torch.inf, torch.nan]).double()
    for out in (x.half(), x.half().nan_to_num(nan=torch.nan).clamp(max=65504)):
        if bool(out[3].isinf()):
            assert_as_accurate(out, baseline=out, exact=x)
    with pytest.raises(AssertionError):
        assert_as_accurate(x.half().clamp(-1000, 1000), baseline=x.half(), exact=x)
