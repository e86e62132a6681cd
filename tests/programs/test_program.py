"""The text of programs: what is written reads back, and what is no program is said."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkern.programs.program import OPERATORS, Parameter, Place, Program, ProgramError, Step, parse

TEXT = """\
layer(hidden, cos, sin, mask)
  x       = rms_norm(hidden, input_layernorm, eps=1e-06, offset=1.0)
  q, k, v = linear(x, attn.qkv[0:8/24], attn.qkv[8:16/24], attn.qkv[16:24/24])
  q, k    = rope(q, k, cos, sin, dim=8, rotary=4, interleaved)
  k, v    = append(k, v)
  a       = attention(q, k, v, mask, dim=8, scale=0.125, causal, window=128, sinks=@attn.sinks)
  h       = linear(a, attn.out, multiplier=0.22, residual=hidden)
  t       = scale(h, by=@gamma)
  hidden  = clamp(t, low=-8.0, high=8.0)
  return hidden"""


def test_text_reads_back() -> None:
    program = parse(TEXT)
    assert str(program) == TEXT
    assert parse(str(program)) == program
    assert parse(TEXT.replace("  ", " ").replace("=", " = ")) == program  # whitespace means nothing


def test_parameters_are_in_the_order_of_their_first_mention_and_each_once() -> None:
    kinds = [("norm", "input_layernorm"), ("linear", "attn.qkv"), ("tensor", "attn.sinks"), ("linear", "attn.out")]
    assert parse(TEXT).parameters() == (*[Parameter(*each) for each in kinds], Parameter("tensor", "gamma"))  # type: ignore[arg-type]


WRONG = {
    "eps=1e-06, offset=1.0": ("eps=1e-06, ofset=1.0", "line 2: there is no option ofset"),
    "rms_norm(hidden, input_layernorm": (
        "rms_norm(hiden, input_layernorm",
        "line 2: x = rms_norm: 0 values, expected 1",
    ),
    "= append": ("= prepend", "line 5: there is no operator prepend"),
    "scale=0.125, causal": ("causal, scale=0.125", "line 6: options are dim, causal, scale"),
    "scale=0.125": ("scale=1", "line 6: scale is 1, expected a number"),
    "window=128": ("window=1.5", "line 6: window is 1.5, expected a whole"),
    ", dim=8, scale": (", scale", "line 6: a = attention: dim is not given"),
    "residual=hidden": ("residual=h", "line 7: h = linear: there is no value h"),
    "k, v    = append": ("k, k    = append", "line 5: k, k = append: 2 results, expected 2 of different names"),
    "[8:16/24]": ("[16:8/24]", "line 3: attn.qkv\\[16:8/24\\]: there are no such rows"),
    "return hidden": ("return y", "it returns y, which no step makes"),
    "layer(hidden, cos": (
        "layer(hidden, hidden, cos",
        "the inputs are hidden, hidden, cos, sin, mask, expected different names",
    ),
    "@gamma": ("gamma", "line 8: by is gamma, expected a number or place"),
    "low=-8.0": ("low=nan", "line 9: hidden = clamp: low is nan, expected a number"),
}


@pytest.mark.parametrize("old", WRONG)
def test_wrong_text_is_said_with_its_line(old: str) -> None:
    new, sentence = WRONG[old]
    assert TEXT.count(old) == 1
    with pytest.raises(ProgramError, match=sentence):
        parse(TEXT.replace(old, new))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_text_is_a_program_or_has_a_sentence(data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, len(TEXT)))
    end = data.draw(st.integers(begin, min(len(TEXT), begin + 12)))
    text = TEXT[:begin] + data.draw(st.text("abhkqvx_@.,=()[]:/ \n0159-ené", max_size=8)) + TEXT[end:]
    try:
        program = parse(text)
    except ProgramError:
        return
    assert parse(str(program)) == program


def test_checks_hold_for_programs_that_are_not_written() -> None:
    step = Step(("y",), "linear", ("hidden",), (Place("a"), Place("b")), (("activation", "swiglu"),))
    assert (
        str(Program(("hidden",), (step,), "y").check()).splitlines()[1]
        == "  y = linear(hidden, a, b, activation=swiglu)"
    )
    with pytest.raises(ProgramError, match="swiglu takes 2 places, not 1"):
        Program(("hidden",), (Step(("y",), "linear", ("hidden",), (Place("a"),), step.options),), "y").check()


def test_every_operator_has_a_place_in_the_executor() -> None:
    from llmkern.programs.program import ACTIVATIONS
    from llmkern.programs.run import ACTIVATION_FUNCTIONS, _Layer

    assert set(ACTIVATION_FUNCTIONS) == set(ACTIVATIONS)
    assert all(name in ACTIVATIONS or hasattr(_Layer, name) for name in OPERATORS)
