"""Nested plain data as values: equal, hashable, immutable, and back to JSON."""

from __future__ import annotations

import json
import pickle
from enum import Enum

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distquant.config import FrozenDict
from distquant.config.frozen import freeze, thaw

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)
OBJECTS = st.dictionaries(st.text(), JSON)
PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)


@PROPERTY
@given(OBJECTS)
def test_goes_there_and_back(data):
    frozen = freeze(data)
    assert thaw(frozen) == data
    assert json.loads(json.dumps(thaw(frozen))) == data
    assert pickle.loads(pickle.dumps(frozen)) == frozen
    assert freeze(frozen) is frozen


@PROPERTY
@given(OBJECTS, OBJECTS)
def test_equality_is_that_of_the_data(one, other):
    assert (freeze(one) == freeze(other)) == (one == other) == (freeze(one) == other)
    reversed_order = FrozenDict(dict(reversed(list(one.items()))))
    assert freeze(one) == reversed_order
    assert hash(freeze(one)) == hash(reversed_order)


def test_nothing_can_change_it():
    source = {"a": [1, {"b": 2}]}
    frozen = FrozenDict(source)
    source["a"].append(3)
    assert thaw(frozen) == {"a": [1, {"b": 2}]}
    with pytest.raises(TypeError, match="does not support item assignment"):
        frozen["a"] = 1  # type: ignore[index]
    with pytest.raises(TypeError, match="does not support item assignment"):
        frozen["a"][0] = 1
    assert frozen != 5


def test_repr_is_that_of_the_data():
    assert repr(FrozenDict({"a": [1], "b": {"c": None}})) == "{'a': [1], 'b': {'c': None}}"


def test_dtypes_enums_and_sets_become_plain():
    class Color(Enum):
        RED = "red"

    given = {Color.RED: {torch.bfloat16, Color.RED}, "t": (1, 2)}
    assert thaw(freeze(given)) == {"red": ["bfloat16", "red"], "t": [1, 2]}


@pytest.mark.parametrize("value", [object(), {"a": object()}, [b"x"], {1: 2}, {("a",): 1}])
def test_what_json_cannot_hold_is_refused(value):
    with pytest.raises(ValueError, match=r"is not (plain data|a name)"):
        freeze(value)
    assert FrozenDict({"a": 1}) != value
