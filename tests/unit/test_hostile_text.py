"""Text that others choose: what is no text is refused, and what a terminal would obey is spelled out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from distquant.cli.main import main
from distquant.config.torchao import TorchaoConfig
from distquant.errors import InputError, Problem
from distquant.model.generation_fields import FIELDS, generation_problems
from distquant.runtime.tokens import check_vocabulary, encoded, template_inputs, tokenizer_call
from distquant.strict_json import parse_json
from distquant.tables import without_controls

ESCAPE = "\x1b[2J\x07"


def test_problems_spell_control_characters_out() -> None:
    problem = Problem(f"a{ESCAPE}", "\ud800\nb", "\x9b")
    assert str(problem) == r"a\x1b[2J\x07: \ud800\nb. \x9b"


@pytest.mark.parametrize("argv", [["plan", "MODEL", ESCAPE], [ESCAPE], ["plan", "MODEL", f"--kernel={ESCAPE}"]])
def test_errors_of_the_command_line_spell_them_out(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.strip().isprintable() and error.startswith("distquant: ")


def test_answers_keep_all_but_control_characters() -> None:
    text = "a\tb\n\u3000\U0001f468\u200d\U0001f469"
    assert without_controls(text) == text
    assert without_controls("\x1b[2J\r\x9b\ud800") == r"\x1b[2J\r\x9b\ud800"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (b'{"a": "\\ud800"}', "U\\+D800"),
        ('{"a": "\udcff"}', "lone surrogate"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff", "utf-8"),
        ("{}".encode("utf-16"), "utf-8"),
        (b"9" * 5000, "limit"),
    ],
)
def test_json_fails_in_one_way(source: str | bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_json(source)


WRONG: tuple[Any, ...] = ("word", -7, 1.5, float("nan"), [], [["a"]], {}, {"a": 1}, "", 2**70)


@pytest.mark.parametrize("name", FIELDS)
def test_generation_fields_are_checked(name: str) -> None:
    assert not list(generation_problems(SimpleNamespace(**{name: None}), 10))
    found = [value for value in WRONG if list(generation_problems(SimpleNamespace(**{name: value}), 10))]
    assert len(found) >= 5  # each field takes some of them at most


def test_a_forced_token_is_in_the_vocabulary() -> None:
    config = SimpleNamespace(forced_eos_token_id=[1, 10])
    assert not list(generation_problems(config, 11))
    (problem,) = generation_problems(config, 10)
    assert problem.what == "names the token 10, and the vocabulary has 10 entries"


def test_tokens_past_the_vocabulary_are_named() -> None:
    check_vocabulary([0, 9], 10)
    check_vocabulary([10], None)
    with pytest.raises(InputError, match=r"prompt: has the token 10, and the model's vocabulary has 10 entries"):
        check_vocabulary([0, 10], 10)


def test_a_prompt_is_text() -> None:
    with pytest.raises(InputError, match=r"--prompt: character 1 is .*lone surrogate"):
        encoded(None, "a\udcff", "--prompt")
    with pytest.raises(InputError, match=r"messages\[0\]: character 0"):
        template_inputs(None, [{"role": "user", "content": "\udcff"}])


def test_what_a_tokenizer_raises_is_an_input_error() -> None:
    panic = type("PanicException", (BaseException,), {})
    for raised in (Exception("rust"), panic("rust"), MemoryError()):
        with pytest.raises(InputError, match="tokenizer: cannot"), tokenizer_call("tokenizer", "cannot", "Fix"):
            raise raised
    with pytest.raises(KeyboardInterrupt), tokenizer_call("tokenizer", "cannot", "Fix"):
        raise KeyboardInterrupt


GRANULARITY = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": 32}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("granularity", "row"),
        ("granularity", {**GRANULARITY, "_data": {}}),
        ("granularity", {**GRANULARITY, "_type": 3}),
        ("granularity", {**GRANULARITY, "_data": {"group_size": float("inf")}}),
        ("group_size", True),
        ("weight_dtype", {"_type": "torch.dtype", "_data": 8}),
    ],
)
def test_types_inside_a_torchao_config(field: str, value: Any) -> None:
    inner = {"_type": "Int8WeightOnlyConfig", "_version": 1, "_data": {field: value}}
    with pytest.raises(InputError, match=f"quant_type.default._data.{field}"):
        TorchaoConfig(quant_type={"default": inner})
