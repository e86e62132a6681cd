"""Which loops over a decoder's layers are plain, by their source."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from llmkern.swap.layer_loop import LayerLoop, layer_loop

ALL = LayerLoop("layers", counted=False)
FIRST = LayerLoop("layers", counted=True)


def decorated(forward: Callable[..., Any]) -> Callable[..., Any]:
    """As transformers decorates its forwards, with a loop of the decorator's own."""

    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        for layer in self.others:
            layer(*args)
        return forward(self, *args, **kwargs)

    return wrapper


def paired(layers: Any) -> Any:
    return zip(layers, reversed(layers), strict=True)


class Plain:
    """Forwards that are one loop, and its form."""

    def over_all(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def over_the_first(self, x):
        for layer in self.layers[: self.config.num_hidden_layers]:
            x = layer(x)
        return x

    def enumerated(self, x):
        for _, layer in enumerate(self.layers):
            x = layer(x)
        return x

    def over_the_first_enumerated(self, hidden_states, masks):
        for layer_idx, decoder_layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            hidden_states = decoder_layer(hidden_states, attention_mask=masks[self.config.layer_types[layer_idx]])
        return hidden_states

    def by_the_kind_of_a_layer(self, x, masks, angles):
        for layer in self.layers:
            x = layer(x, attention_mask=masks[layer.attention_type], position_embeddings=angles[layer.attention_type])
        return x

    def with_the_same_for_each(self, x, mask, cache, **kwargs):
        for layer in self.layers:
            x = layer(x, attention_mask=mask, past_key_values=cache, use_cache=True, **kwargs)
        return x

    def by_position(self, x, mask, cache, flag):
        for layer in self.layers:
            x = layer(x, mask, cache if not (self.checkpointing and self.training) else None, flag=flag or self.flag)
        return x

    def drops_layers_in_training(self, x, mask):
        for _, layer in enumerate(self.layers):
            if self.training and self.layerdrop > 0.0:
                drawn = self.draw()
                if drawn < self.layerdrop:
                    continue
            x = layer(x, mask)
        return x

    def drops_layers_by_a_flag(self, x, mask, synced):
        for layer in self.layers:
            to_drop = False
            if self.training and self.layerdrop > 0.0:
                to_drop = self.draw() < self.layerdrop
            if not to_drop or synced:
                x = layer(x, mask)
        return x

    def between_other_statements(self, x, mask):
        x = self.embedding(x)
        for name in self.names:
            mask = mask + name
        if mask is not None:
            for layer in self.layers:
                x = layer(x, attention_mask=mask)
        return [self.norm(each) for each in x]

    @decorated
    @decorated
    def below_decorators(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Handing:
    """Loops in which layers return more than the hidden states, and their forms."""

    def dropped(self, x):
        for layer in self.layers:
            x, _ = layer(x)
        return x

    dropped.form = LayerLoop("layers", counted=False, results=2)

    def as_t5_does(self, x, mask, encoder):
        bias = None
        other_bias = None
        for layer in self.layers:
            x, made, other_made = layer(x, mask, bias, encoder, other_bias=other_bias)
            bias = made
            if self.is_decoder and encoder is not None:
                other_bias = other_made
        return x

    as_t5_does.form = LayerLoop("layers", counted=False, results=3, handed=((1, 1), (2, "other_bias")))


class Other:
    """Forwards in which something else may happen to the hidden states, or a layer may be told something of its own."""

    def two_statements(self, x):
        for layer in self.layers:
            x = layer(x)
            self.seen.append(x)
        return x

    def condition(self, x):
        for layer in self.layers:
            if layer.wanted:
                x = layer(x)
        return x

    def conditional_value(self, x):
        for layer in self.layers:
            x = layer(x) if layer.wanted else x
        return x

    def part_of_a_tuple(self, x):
        for layer in self.layers:
            x = layer(x)[0]
        return x

    def read_after_the_loop(self, x):
        for layer in self.layers:
            x, seen = layer(x)
        return x, seen

    def handed_on_and_read_after_the_loop(self, x):
        bias = None
        for layer in self.layers:
            x, made = layer(x, bias)
            bias = made
        return x, bias

    def handed_on_within_an_argument(self, x, angles):
        bias = None
        for layer in self.layers:
            x, made = layer(x, bias or angles)
            bias = made
        return x

    def handed_on_in_part(self, x):
        bias = None
        for layer in self.layers:
            x, made = layer(x, bias)
            bias = made + 1
        return x

    def a_result_as_an_argument(self, x):
        made = None
        for layer in self.layers:
            x, made = layer(x, made)
        return x

    def a_call_decides_what_is_handed_on(self, x):
        bias = None
        for layer in self.layers:
            x, made = layer(x, bias)
            if self.wanted():
                bias = made
        return x

    def the_hidden_states_are_handed_on(self, x):
        first = None
        for layer in self.layers:
            x, _ = layer(x, first)
            first = x
        return x

    def the_same_name_twice(self, x):
        for layer in self.layers:
            x, x = layer(x)
        return x

    def a_star(self, x):
        for layer in self.layers:
            x, *_ = layer(x)
        return x

    def two_targets(self, x):
        for layer in self.layers:
            x = self.last = layer(x)
        return x

    def attribute_target(self, x):
        self.x = x
        for layer in self.layers:
            self.x = layer(self.x)
        return self.x

    def sum_of_two(self, x):
        for layer in self.layers:
            x += layer(x)
        return x

    def scaled(self, x):
        for layer in self.layers:
            x = 2 * layer(x)
        return x

    def result_is_dropped(self, x):
        for layer in self.layers:
            layer(x)
        return x

    def another_argument(self, x, y):
        for layer in self.layers:
            x = layer(y)
        return x

    def changed_argument(self, x):
        for layer in self.layers:
            x = layer(x + 1)
        return x

    def some_by_a_star(self, x, masks):
        for layer in self.layers:
            x = layer(x, *masks)
        return x

    def drops_layers_in_evaluation(self, x):
        for layer in self.layers:
            if self.layerdrop > 0.0:
                continue
            x = layer(x)
        return x

    def a_flag_that_means_otherwise(self, x):
        for layer in self.layers:
            to_drop = True
            if not to_drop:
                x = layer(x)
        return x

    def attribute_of_the_layer(self, x):
        for layer in self.layers:
            x = layer(x, scale=layer.scale)
        return x

    def many_arguments(self, x):
        for layer in self.layers:
            x = layer(*x)
        return x

    def argument_by_keyword(self, x):
        for layer in self.layers:
            x = layer(hidden_states=x)
        return x

    def a_method_of_the_layer(self, x):
        for layer in self.layers:
            x = layer.run(x)
        return x

    def another_callee(self, x):
        for _layer in self.layers:
            x = self.checkpoint(x)
        return x

    def hidden_states_in_a_keyword(self, x):
        for layer in self.layers:
            x = layer(x, residual=x)
        return x

    def hidden_states_within_a_keyword(self, x):
        for layer in self.layers:
            x = layer(x, **{"residual": x})
        return x

    def layer_in_a_keyword(self, x):
        for layer in self.layers:
            x = layer(x, which=layer)
        return x

    def index_in_a_keyword(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x, which=i)
        return x

    def one_for_each_layer(self, x, masks):
        for i, layer in enumerate(self.layers):
            x = layer(x, attention_mask=masks[i])
        return x

    def kinds_of_another_index(self, x, masks, j):
        for _, layer in enumerate(self.layers):
            x = layer(x, attention_mask=masks[self.config.layer_types[j]])
        return x

    def kinds_of_the_hidden_states(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x, attention_mask=x[self.config.layer_types[i]])
        return x

    def kind_as_an_index_of_nothing_named(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x, attention_mask=self.masks()[self.config.layer_types[i]])
        return x

    def tuple_made_for_each(self, x, cos, sin):
        for layer in self.layers:
            x = layer(x, position_embeddings=(cos, sin))
        return x

    def call_for_each(self, x, masks):
        for layer in self.layers:
            x = layer(x, attention_mask=next(masks))
        return x

    def choice_for_each(self, x, angles):
        for i, layer in enumerate(self.layers):
            x = layer(x, position_embeddings=angles if self.config.rope[i] else None)
        return x

    def otherwise(self, x):
        for layer in self.layers:
            x = layer(x)
        else:
            x = x + 1
        return x

    def after_the_first(self, x):
        for layer in self.layers[1 : self.config.num_hidden_layers]:
            x = layer(x)
        return x

    def every_other(self, x):
        for layer in self.layers[: self.config.num_hidden_layers : 2]:
            x = layer(x)
        return x

    def another_count(self, x):
        for layer in self.layers[: self.config.num_layers]:
            x = layer(x)
        return x

    def from_the_first(self, x):
        for layer in self.layers[0 : self.config.num_hidden_layers]:
            x = layer(x)
        return x

    def copied(self, x):
        for layer in self.layers[:]:
            x = layer(x)
        return x

    def one_of_many(self, x, i):
        for layer in self.layers[i]:
            x = layer(x)
        return x

    def reversed_order(self, x):
        for layer in reversed(self.layers):
            x = layer(x)
        return x

    def counted_from_one(self, x):
        for _, layer in enumerate(self.layers, 1):
            x = layer(x)
        return x

    def counted_from_a_keyword(self, x):
        for _, layer in enumerate(self.layers, start=1):
            x = layer(x)
        return x

    def enumerated_as_pairs(self, x):
        for layer in enumerate(self.layers):
            x = layer(x)
        return x

    def enumerated_into_one(self, x):
        for (layer,) in enumerate(self.layers):
            x = layer(x)
        return x

    def pairs_of_another_kind(self, x):
        for _, layer in paired(self.layers):
            x = layer(x)
        return x

    def enumerated_as_a_pair_of_pairs(self, x):
        for _, (layer, _) in enumerate(self.layers):
            x = layer(x)
        return x

    def zipped(self, x):
        for layer, _ in zip(self.layers, self.others, strict=True):
            x = layer(x)
        return x

    def of_another_object(self, x, other):
        for layer in other.layers:
            x = layer(x)
        return x

    def of_a_part(self, x):
        for layer in self.stack.layers:
            x = layer(x)
        return x

    def of_an_argument(self, x, layers):
        for layer in layers:
            x = layer(x)
        return x

    def two_loops(self, x):
        for layer in self.layers:
            x = layer(x)
        for layer in self.more_layers:
            x = layer(x)
        return x

    def mentioned_again(self, x):
        for layer in self.layers:
            x = layer(x)
        return x, len(self.layers)

    def of_another_object_too(self, x, cache):
        for layer in self.layers:
            x = layer(x)
        return x, cache.layers

    def last_layer_after_it(self, x):
        for layer in self.layers:
            x = layer(x)
        return layer(x)

    def no_loop(self, x):
        return self.layers[0](x)

    def comprehension(self, x):
        return [layer(x) for layer in self.layers]


def forwards(cls: type) -> Any:
    found = {name: member for name, member in vars(cls).items() if callable(member)}
    return pytest.mark.parametrize("forward", found.values(), ids=found)


@forwards(Plain)
def test_a_plain_loop_is_found(forward: Callable[..., Any]) -> None:
    assert layer_loop(forward) == (FIRST if "first" in forward.__name__ else ALL)


@forwards(Handing)
def test_layers_hand_results_on(forward: Callable[..., Any]) -> None:
    assert layer_loop(forward) == forward.form  # type: ignore[attr-defined]


@forwards(Other)
def test_any_other_loop_is_not(forward: Callable[..., Any]) -> None:
    assert layer_loop(forward) is None


def test_the_list_has_any_name() -> None:
    class Decoder:
        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    assert layer_loop(Decoder.forward) == LayerLoop("blocks", counted=False)


def test_there_may_be_no_source() -> None:
    made: dict[str, Any] = {}
    exec("def forward(self, x):\n  for layer in self.layers:\n    x = layer(x)\n  return x", made)
    assert layer_loop(made["forward"]) is None
    assert layer_loop(len) is None
    assert layer_loop(functools.partial(Plain.over_all, None)) is None


def test_a_piece_of_a_statement_is_no_source() -> None:
    """getsource gives the lines on which a lambda stands."""
    forwards = {
        "forward": lambda self, x: x,
    }
    assert layer_loop(forwards["forward"]) is None
