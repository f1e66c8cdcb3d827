"""The generic machinery, on a method invented for the purpose, and the lightness of the import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from distquant.config import QuantizationConfig, parse
from distquant.config.values import coerce, describe
from distquant.errors import InputError

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyConfig(QuantizationConfig):
    quant_method: ClassVar[str] = "toy"
    aliases: ClassVar[Mapping[str, str]] = {"w_bit": "bits"}
    skip_field: ClassVar[str | None] = "modules_to_not_convert"

    bits: Literal[2, 4, 8]
    block: tuple[int, int] | None = None
    scale: float | str = "auto"
    modules_to_not_convert: tuple[str, ...] | None = None


class Method(str, Enum):
    TOY = "toy"


def test_required_aliased_and_nested_fields():
    config = parse({"quant_method": Method.TOY, "w_bit": 4, "block": [128, 64]}, [ToyConfig])
    assert config == ToyConfig(bits=4, block=(128, 64))
    assert config.to_dict() == {
        "quant_method": "toy",
        "bits": 4,
        "block": [128, 64],
        "scale": "auto",
        "modules_to_not_convert": None,
    }
    assert config.to_diff_dict() == {"quant_method": "toy", "bits": 4, "block": [128, 64]}


def test_the_method_s_own_skip_field_selects():
    selection = ToyConfig(bits=4, modules_to_not_convert=["head"], layers="1").selection
    assert selection.skip == ("head",)
    assert selection.selects("layers.1.up")
    assert not selection.selects("layers.1.head")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"quantization_config\.bits: is missing\. Give one of 2, 4, 8"),
        ({"bits": 3}, r"quantization_config\.bits: 3 is not allowed\. Give one of 2, 4, 8"),
        ({"bits": True}, r"bits: True is not allowed"),
        ({"bits": 4, "w_bit": 8}, r"w_bit: 8 contradicts bits=4"),
        ({"bits": 4, "block": [1, 2, 3]}, r"block: \[1, 2, 3\] .*a list of an integer, an integer or null"),
        ({"bits": 4, "scale": None}, r"scale: None is not allowed\. Give a number or a string"),
    ],
)
def test_errors(given, message):
    with pytest.raises(InputError, match=message):
        ToyConfig.from_dict(given)


def test_a_missing_field_does_not_hide_the_others():
    with pytest.raises(InputError, match=r"(?s)2 problems.*blok: is unknown.*'block'.*bits: is missing"):
        ToyConfig.from_dict({"blok": None})


def test_a_wrong_required_field_does_not_hide_the_other_types():
    with pytest.raises(InputError, match=r"(?s)2 problems.*bits: 3.*scale: None"):
        ToyConfig(bits=3, scale=None)


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [(bool, True, 1), (int, 3, True), (int, 3, 3.0), (str, "a", 1), (float, 1.5, "1.5"), (tuple[int, ...], (1, 2), 1)],
)
def test_coerce_does_not_guess(hint, good, bad):
    assert coerce(good, hint) == good
    with pytest.raises(ValueError, match=r"is not " + describe(hint).replace("(", r"\(").replace(")", r"\)")):
        coerce(bad, hint)


def test_json_sources(tmp_path):
    path = tmp_path / "toy.json"
    path.write_text(ToyConfig(bits=8).to_json())
    assert ToyConfig.from_json(path) == ToyConfig.from_json(str(path)) == parse(str(path), [ToyConfig])
    assert parse(path, [ToyConfig]) == parse('{"quant_method": "toy", "bits": 8}', [ToyConfig]) == ToyConfig(bits=8)


@pytest.mark.parametrize(
    ("text", "message"), [("{", r"bad\.json: is not JSON"), ("[1]", r"bad\.json: holds a JSON list. Give one JSON obj")]
)
def test_bad_json_files(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(InputError, match=message):
        parse(tmp_path / "bad.json", [ToyConfig])


def test_missing_file_and_bad_text():
    with pytest.raises(InputError, match=r"nowhere\.json: cannot be read \(No such file"):
        parse("nowhere.json", [ToyConfig])
    with pytest.raises(InputError, match=r"quantization_config: is not JSON"):
        parse("{'bits': 4}", [ToyConfig])


MODULES_BELOW = str(
    [
        f"distquant.{name}"
        for name in ("dtypes", "errors", "files", "patterns", "strict_json", "tables", "whole_numbers")
    ]
)


def test_importing_is_light():
    """The standard library and a few modules below; a bare stand-in for the package keeps its own imports out."""
    code = f"""
import sys, types
package = types.ModuleType("distquant")
package.__path__ = [{str(ROOT / "distquant")!r}]
sys.modules["distquant"] = package
before = set(sys.modules)
import distquant.config
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(sorted(new - sys.stdlib_module_names))
print(sorted(name for name in sys.modules if name.startswith("distquant.") and ".config" not in name))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["['distquant']", MODULES_BELOW]


def test_base_is_generic_about_any():
    value: Any = object()
    assert coerce(value, Any) is value
