"""Whole numbers in texts from outside, and all that reads one."""

from __future__ import annotations

import pytest

from distquant.config.selection import layer_of, parse_layers
from distquant.model.module_names import ModuleNames
from distquant.model.weight_mapping import _last_number, natural
from distquant.whole_numbers import MOST_DIGITS, whole_number

NO_NUMBERS = ("", " 1", "-1", "1.0", "²", "٣", "9" * 5000, "1" + "0" * MOST_DIGITS, "x")


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_other_texts_are_no_numbers(text: str) -> None:
    assert whole_number(text) is None


@pytest.mark.parametrize(("text", "number"), [("0", 0), ("000", 0), ("0" * 5000 + "7", 7), ("9" * 18, 10**18 - 1)])
def test_digits_are_a_number(text: str, number: int) -> None:
    assert whole_number(text) == number


@pytest.mark.parametrize("part", NO_NUMBERS)
def test_a_name_may_have_any_part_in_the_place_of_a_number(part: str) -> None:
    name = f"model.layers.{part.replace('.', '_')}.mlp.up_proj"
    assert layer_of(name) is None
    assert _last_number(name) == 0
    assert sorted([name, "model.layers.3.mlp.up_proj", "model.layers.x.mlp.up_proj"], key=natural)
    assert ModuleNames({}).of(name) == (name,)


def test_layers_of_too_many_digits_are_an_error() -> None:
    assert parse_layers("0-99999999999") == ((0, 99999999999),)
    with pytest.raises(ValueError, match="more than 18 digits"):
        parse_layers("0-" + "9" * 5000)
