from __future__ import annotations

import importlib
import math

import pytest
import torch

from llmkern import ops


def angles(length: int, pairs: int) -> torch.Tensor:
    return torch.arange(length)[:, None] * 10000.0 ** -(torch.arange(pairs) / pairs)


def test_a_quarter_turn() -> None:
    """cos 0, sin 1 takes (a, b) to (−b, a); the fifth dimension is not rotated."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).view(1, 1, 1, 5)
    cos, sin = torch.zeros(1, 4), torch.ones(1, 4)
    q, k = ops.rope(x, x * 10, cos, sin)
    assert q.flatten().tolist() == [-3, -4, 1, 2, 5]
    assert k.flatten().tolist() == [-30, -40, 10, 20, 50]
    q, _ = ops.rope(x, x, cos, sin, interleaved=True)
    assert q.flatten().tolist() == [-2, 1, -4, 3, 5]


def test_scores_depend_on_the_distance_only() -> None:
    angle = angles(20, 8)
    q, k = (torch.randn(1, 1, 1, 16).expand(1, 1, 20, 16) for _ in range(2))
    for interleaved in (False, True):
        rotated_q, rotated_k = ops.rope(q, k, angle.cos(), angle.sin(), rotary_dim=16, interleaved=interleaved)
        scores = (rotated_q @ rotated_k.mT)[0, 0]
        torch.testing.assert_close(scores[3:, 3:], scores[:-3, :-3], rtol=1e-4, atol=1e-4)


def test_one_value_per_pair_is_the_same_as_repeated_values() -> None:
    q, k, angle = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 6, 16), angles(6, 8)
    cos, sin = angle.cos(), angle.sin()
    half = ops.rope(q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
    torch.testing.assert_close(ops.rope(q, k, cos, sin, rotary_dim=16), half, rtol=0, atol=0)
    repeated = ops.rope(q, k, cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1), interleaved=True)
    torch.testing.assert_close(ops.rope(q, k, cos, sin, rotary_dim=16, interleaved=True), repeated, rtol=0, atol=0)


# model: head dimension, width of cos and sin, and how its apply_rotary_pos_emb is said with the op
MODELS = {
    "llama": (64, 64, {}),
    "gpt_neox": (64, 16, {}),
    "phi3": (96, 72, {}),
    "gpt_oss": (64, 32, {"rotary_dim": 64}),
    "cohere": (64, 64, {"interleaved": True}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_serves_what_transformers_models_do(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("transformers")
    model = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    dim, width, options = MODELS[name]
    q, k = (torch.randn(2, 5, heads, dim, dtype=dtype).transpose(1, 2) for heads in (4, 2))
    angle = torch.randn(2, 5, width) * 3
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    expected = model.apply_rotary_pos_emb(q, k, cos, sin)
    exact = ops.rope(q.double(), k.double(), cos.double(), sin.double(), **options)
    for ours, theirs, judge in zip(ops.rope(q, k, cos, sin, **options), expected, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.stride() == torch.empty(ours.shape).stride()
        theirs_error = (theirs.double() - judge).abs().max()
        assert theirs_error <= 8 * torch.finfo(dtype).eps, "this is not what the model computes"
        assert (ours.double() - judge).abs().max() <= 2 * theirs_error


def test_glm_takes_the_first_half_of_cos_per_pair() -> None:
    glm = pytest.importorskip("transformers.models.glm.modeling_glm")
    q, k, angle = torch.randn(2, 4, 5, 64), torch.randn(2, 2, 5, 64), torch.randn(2, 5, 16)
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    ours = ops.rope(q, k, cos[..., :16], sin[..., :16], rotary_dim=32, interleaved=True)
    torch.testing.assert_close(ours, glm.apply_rotary_pos_emb(q, k, cos, sin))


def test_gptj_rotates_heads_before_the_transposition() -> None:
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    q, k, angle = torch.randn(2, 5, 4, 32), torch.randn(2, 5, 4, 32), torch.randn(2, 5, 16)
    ours = ops.rope(q.transpose(1, 2), k.transpose(1, 2), angle.cos(), angle.sin(), rotary_dim=32, interleaved=True)
    for out, x in zip(ours, (q, k), strict=True):
        expected = gptj.apply_rotary_pos_emb(x, angle.sin(), angle.cos())
        torch.testing.assert_close(out.transpose(1, 2), expected)


def test_gradients_of_cos_and_sin_are_refused_not_cut() -> None:
    q, cos = torch.randn(1, 1, 2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    with pytest.raises(ValueError, match="rope: cos or sin requires a gradient"):
        ops.rope(q, q, cos, cos.detach())
    with torch.no_grad():
        ops.rope(q, q, cos, cos)
    out, _ = torch.ops.llmkern.rope(q, q, cos[None], cos[None].detach(), 4, False)
    with pytest.raises(RuntimeError, match="no gradient in cos and sin"):
        out.sum().backward()


def test_bad_input() -> None:
    q, k, cos = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(3, 8)
    with pytest.raises(TypeError, match=r"rope: k is torch\.float16, expected torch\.float32 \(the dtype of q\)"):
        ops.rope(q, k.half(), cos, cos)
    with pytest.raises(TypeError, match=r"rope: sin is torch\.float16, expected torch\.float32 \(the dtype of cos\)"):
        ops.rope(q, k, cos, cos.half())
    with pytest.raises(ValueError, match=r"rope: q has shape \[4, 3, 8\], expected \[B, Hq, S, D\]"):
        ops.rope(q[0], k, cos, cos)
    with pytest.raises(ValueError, match=r"rope: k has shape \[1, 2, 3, 8\], expected \[2, 2, 3, 8\]"):
        ops.rope(q, k[:1], cos, cos)
    with pytest.raises(ValueError, match=r"rope: cos has shape \[1, 4, 8\], expected \[2 or 1, 3, W\] or \[3, W\]"):
        ops.rope(q, k, torch.randn(4, 8), torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"rope: sin has shape \[1, 3, 6\], expected \[1, 3, 8\] \(the shape of cos\)"):
        ops.rope(q, k, cos, cos[:, :6])
    with pytest.raises(ValueError, match=r"rope: rotary_dim is 6, expected 8 or 16 \(cos has width 8\)"):
        ops.rope(q, k, cos, cos, rotary_dim=6)
    for width, said in ((5, "5"), (10, "10"), (0, "0")):
        with pytest.raises(ValueError, match=f"{said} dimensions to rotate, expected an even number from 2 to 8"):
            ops.rope(q, k, torch.randn(3, width), torch.randn(3, width))
    with pytest.raises(ValueError, match=r"rope: cos is on meta, expected cpu"):
        ops.rope(q, k, cos.to("meta"), cos)


def test_frequencies_of_the_paper() -> None:
    """Position 1, base 10000, D 4: angles 1 and 1/100."""
    x = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64).view(1, 1, 1, 4).expand(1, 1, 2, 4)
    angle = angles(2, 2).double()
    q, _ = ops.rope(x, x, angle.cos(), angle.sin(), rotary_dim=4)
    expected = [math.cos(1), math.cos(0.01), math.sin(1), math.sin(0.01)]
    torch.testing.assert_close(q[0, 0, 1], torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=0)
