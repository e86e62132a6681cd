"""attention against oracles that share no code with it: loops over rows, and published examples."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern import dispatch, ops
from llmkern.dispatch import use_backend
from llmkern.testing.case import Call, Case, Make, cases
from llmkern.testing.compare import upcast

CASES = [case for case in cases("attention") if case.dtype == torch.float32]
BACKENDS = ("reference", "torch")


def run(backend: str, call: Call) -> tuple[Tensor, Tensor]:
    impl = dispatch.implementation("attention", backend)
    if reason := impl.why_not(**call):
        pytest.skip(reason)
    return impl.fn(**call)


def sees(call: Call, b: int, h: int, i: int, j: int) -> bool:
    """May query i of head h see key j: one rule after the other, as the docstring has them."""
    queries, keys = call["q"].shape[2], call["k"].shape[2]
    left, right = call["window"]
    own = i + keys - queries
    padding, mask = call["key_padding_mask"], call["attn_mask"]
    if call["causal"] and j > own:
        return False
    if left >= 0 and j < own - left:
        return False
    if right >= 0 and j > own + right:
        return False
    if padding is not None and not padding[b, j]:
        return False
    return mask is None or mask.dtype != torch.bool or bool(entry(call, b, h, i, j))


def entry(call: Call, b: int, h: int, i: int, j: int) -> Tensor:
    mask = call["attn_mask"]
    where = (min(n, size - 1) for n, size in zip((b, h, i, j), mask.shape, strict=True))
    return mask[tuple(where)]


def by_rows(call: Call) -> tuple[Tensor, Tensor]:
    """out and lse of every row from a Python list of the keys it sees."""
    q, k, v, sinks = call["q"], call["k"], call["v"], call["sinks"]
    additive = call["attn_mask"] is not None and call["attn_mask"].dtype != torch.bool
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], -math.inf)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            head = h // (q.shape[1] // k.shape[1])
            for i in range(q.shape[2]):
                seen = [j for j in range(k.shape[2]) if sees(call, b, h, i, j)]
                logits = k[b, head, seen] @ q[b, h, i] * call["sm_scale"]
                if call["softcap"]:
                    logits = call["softcap"] * torch.tanh(logits / call["softcap"])
                if additive and seen:
                    logits = logits + torch.stack([entry(call, b, h, i, j) for j in seen])
                values = v[b, head, seen]
                if sinks is not None:
                    logits = torch.cat([logits, sinks[h, None]])
                    values = torch.cat(
                        [values, torch.zeros_like(v[b, head, :1])] if seen else [v.new_zeros(1, v.shape[3])]
                    )
                if logits.numel() and not bool((logits == -math.inf).all()):
                    out[b, h, i] = torch.softmax(logits, 0) @ values
                    lse[b, h, i] = torch.logsumexp(logits, 0)
    return out, lse


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_row_by_row_definition(case: Case) -> None:
    call = upcast(case.make())
    out, lse = run("reference", call)
    want_out, want_lse = by_rows(call)
    torch.testing.assert_close(out, want_out, rtol=1e-12, atol=1e-12, equal_nan=True)
    if call["return_lse"]:
        torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("case", cases("attention"), ids=str)
def test_torch_backend_against_the_reference(case: Case) -> None:
    """Bounds that a missing key or a wrong scale breaks; NaN must be where the reference has it."""
    call = case.make()
    out, _ = run("torch", call)
    want, _ = dispatch.implementation("attention", "reference").fn(**upcast(call))
    tolerance = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[case.dtype]
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance, equal_nan=True)


def leaves(case: Case, call: Call) -> dict[str, Tensor]:
    return {n: call[n].requires_grad_() for n in case.differentiable if isinstance(call[n], Tensor)}


@pytest.mark.parametrize("case", [c for c in CASES if c.differentiable], ids=str)
def test_gradients_of_the_torch_backend(case: Case) -> None:
    """In float64, against the reference; rows that see nothing send no NaN back."""
    found = []
    for backend in ("torch", "reference"):
        call = upcast(case.make())
        inputs = leaves(case, call)
        out, _ = run(backend, call)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        found.append(torch.autograd.grad(out, list(inputs.values()), weights))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_gradients_of_everything_at_once_against_finite_differences() -> None:
    """Softcap, sinks, bias, window, padding and log-sum-exp; the second sequence's rows see one key or none."""
    make = Make(torch.float64, "cpu", seed=0)
    q, k, v = make.randn(2, 2, 3, 4, scale=2.0), make.randn(2, 1, 4, 4), make.randn(2, 1, 4, 4)
    bias, sinks = make.randn(1, 2, 3, 4), make.randn(2)
    padding = torch.tensor([[True] * 4, [True, False, False, False]])

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.llmkern.attention(q, k, v, bias, padding, sinks, True, 0.7, [2, -1], 1.5, True)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in (q, k, v, bias, sinks)])


def test_the_gradient_of_a_shared_bias_has_the_shape_of_the_bias() -> None:
    (case,) = [c for c in CASES if c.name == "9x11-bias"]
    call = case.make()
    bias = call["attn_mask"].requires_grad_()
    out, _ = torch.ops.llmkern.attention(**call)
    (gradient,) = torch.autograd.grad(out.sum(), bias)
    assert gradient.shape == (1, 4, 9, 11)


def visible_pattern(backend: str, queries: int, keys: int, **options: object) -> list[list[int]]:
    """Which keys reach each query: all scores equal, and value j is the j-th unit vector."""
    q, k = torch.zeros(1, 1, queries, 8), torch.zeros(1, 1, keys, 8)
    v = torch.eye(8)[:keys][None, None]
    with use_backend(backend):
        out = ops.attention(q, k, v, **options)
    return (out[0, 0, :, :keys] > 0).int().tolist()


# From the docstring of flash_attn_func: "the causal mask is aligned to the bottom right corner".
WIDE = [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
TALL = [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_alignment_as_flash_attention_documents_it(backend: str) -> None:
    assert visible_pattern(backend, 2, 5, causal=True) == WIDE
    assert visible_pattern(backend, 5, 2, causal=True) == TALL


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [(1, 0), (2, 1), (-1, 1), (1, -1), (0, 0)], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (2, 7), (6, 3), (1, 8)])
def test_windows_as_flash_attention_documents_them(
    backend: str, window: tuple[int, int], queries: int, keys: int
) -> None:
    """Its words: keys between [i + seqlen_k - seqlen_q - left, i + seqlen_k - seqlen_q + right] inclusive."""
    left, right = (math.inf if side == -1 else side for side in window)
    want = [
        [int(i + keys - queries - left <= j <= i + keys - queries + right) for j in range(keys)] for i in range(queries)
    ]
    assert visible_pattern(backend, queries, keys, window=window) == want


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_int_window_counts_the_query_itself(backend: str) -> None:
    assert visible_pattern(backend, 3, 5, window=2, causal=True) == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert visible_pattern(backend, 3, 3, window=2) == [[1, 1, 0], [1, 1, 1], [0, 1, 1]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_plain_call_is_scaled_dot_product_attention(backend: str, causal: bool) -> None:
    q, k, v = torch.randn(3, 2, 6, 20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k, v = k[:, :2], v[:, :2]
    want = F.scaled_dot_product_attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), is_causal=causal, dropout_p=0.0
    )
    with use_backend(backend):
        torch.testing.assert_close(ops.attention(q, k, v, causal=causal), want, rtol=1e-12, atol=1e-12)


def test_masks_of_fewer_dimensions() -> None:
    (case,) = [c for c in CASES if c.name == "9x11-mask-11qk"]
    call = case.make()
    q, k, v, mask = call["q"], call["k"], call["v"], call["attn_mask"]
    want = ops.attention(q, k, v, attn_mask=mask)
    assert torch.equal(ops.attention(q, k, v, attn_mask=mask[0, 0]), want)
    assert torch.equal(ops.attention(q, k, v, attn_mask=mask[0]), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_reaches_exactly_the_rows_that_see_it(backend: str) -> None:
    q, k, v = torch.randn(3, 1, 1, 40, 16, generator=torch.Generator().manual_seed(0))
    q[0, 0, 7, 2] = math.nan
    with use_backend(backend):
        rows = ops.attention(q, k, v, causal=True)[0, 0].isnan().any(-1)
        assert rows.nonzero().flatten().tolist() == [7]
        few = ops.attention(q[:, :, 5:9], k[:, :, :4], v[:, :, :4], causal=True)[0, 0].isnan().all(-1)
    assert few.tolist() == [False, False, True, False]


def test_scaled_dot_product_attention_is_refused_where_the_log_sum_exp_is_wanted() -> None:
    call = CASES[0].make() | {"return_lse": True}
    reason = dispatch.implementation("attention", "torch").why_not(**call)
    assert reason == "scaled_dot_product_attention does not return the log-sum-exp"
    assert dispatch.select("attention", call).backend.name != "torch"
    with use_backend("torch"), pytest.raises(dispatch.Refused, match="does not return the log-sum-exp"):
        ops.attention(**call)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_what_the_backward_reads_is_kept_only_where_a_gradient_is_needed(backend: str) -> None:
    impl = dispatch.implementation("attention", backend)
    if backend == "triton" and impl.backend.missing:  # what "cuda" calls computes on the CPU too
        pytest.skip(impl.backend.missing)
    call = CASES[0].make() | {"return_lse": False}
    leaf = call | {"q": call["q"].requires_grad_()}
    assert impl.fn(**leaf)[1].shape == call["q"].shape[:3]
    with torch.no_grad():
        assert impl.fn(**leaf)[1].numel() == 0


def tensors(**replaced: object) -> dict[str, object]:
    return {"q": torch.zeros(2, 4, 5, 8), "k": torch.zeros(2, 2, 6, 8), "v": torch.zeros(2, 2, 6, 8)} | replaced


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (tensors(q=torch.zeros(4, 5, 8)), ValueError, r"q has shape \[4, 5, 8\], expected 4 dimensions"),
        (tensors(q=torch.zeros(2, 4, 5, 8).int()), TypeError, "q is torch.int32, expected float32"),
        (tensors(k=[1.0]), TypeError, "k is a list, expected a Tensor"),
        (tensors(k=torch.zeros(2, 2, 6, 8).half()), TypeError, "k is torch.float16, expected torch.float32"),
        (tensors(v=torch.zeros(2, 2, 6, 8, device="meta")), ValueError, "v is on meta, expected cpu"),
        (tensors(k=torch.zeros(2, 3, 6, 8), v=torch.zeros(2, 3, 6, 8)), ValueError, "q has 4 heads, .* of k's 3"),
        (tensors(k=torch.zeros(2, 2, 6, 9)), ValueError, r"k has head dimension 9, expected 8 \(q's\)"),
        (tensors(k=torch.zeros(1, 2, 6, 8), v=torch.zeros(1, 2, 6, 8)), ValueError, "k has batch size 1, expected 2"),
        (tensors(v=torch.zeros(2, 2, 7, 8)), ValueError, r"v has shape \[2, 2, 7, 8\], expected \[2, 2, 6, 8\]"),
        (tensors(attn_mask=torch.ones(5, 7)), ValueError, r"attn_mask has shape \[5, 7\], .* to \[2, 4, 5, 6\]"),
        (tensors(attn_mask=torch.ones(1, 1, 1, 5, 6)), ValueError, "attn_mask has shape"),
        (tensors(attn_mask=torch.ones(5, 6).long()), TypeError, "attn_mask is torch.int64, expected torch.bool or"),
        (tensors(attn_mask=torch.ones(5, 6, device="meta")), ValueError, "attn_mask is on meta, expected cpu"),
        (
            tensors(key_padding_mask=torch.ones(2, 6)),
            TypeError,
            "key_padding_mask is torch.float32, expected torch.bool",
        ),
        (tensors(key_padding_mask=torch.ones(2, 5).bool()), ValueError, r"key_padding_mask has shape \[2, 5\]"),
        (tensors(sinks=torch.zeros(2)), ValueError, r"sinks has shape \[2\], expected \[4\] \(q's heads\)"),
        (tensors(sinks=torch.zeros(4).int()), TypeError, "sinks is torch.int32"),
        (tensors(sm_scale=math.nan), ValueError, "sm_scale is nan, expected a finite number"),
        (tensors(softcap=-1.0), ValueError, "softcap is -1.0, expected a finite number that is not negative"),
        (tensors(window=0), ValueError, r"window is 0, expected an int >= 1 or \(left, right\)"),
        (tensors(window=(3,)), ValueError, r"window is \(3,\)"),
        (tensors(window=(3, -2)), ValueError, r"window is \(3, -2\)"),
        (tensors(window=2.5), ValueError, "window is 2.5"),
    ],
)
def test_bad_input(call: dict, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=f"^attention: .*{sentence}"):
        ops.attention(**call)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda call: call.update(causal=not call["causal"]),
        lambda call: call.update(sm_scale=2 * call["sm_scale"]),
        lambda call: call.update(window=[3, -1]),
        lambda call: call.update(softcap=1.0),
    ],
)
def test_the_row_by_row_oracle_notices_each_argument(spoil: Callable[[Call], None]) -> None:
    call = upcast(CASES[0].make())
    before, _ = by_rows(call)
    spoil(call)
    after, _ = by_rows(call)
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(run("reference", call)[0], after, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("flag", ["causal", "return_lse"])
@pytest.mark.parametrize("value", ["yes", None, 1])
def test_a_flag_is_true_or_false(flag: str, value: object) -> None:
    x = torch.randn(1, 2, 4, 16)
    with pytest.raises(TypeError, match=f"attention: {flag} is {value!r}, expected True or False"):
        ops.attention(x, x, x, **{flag: value})
