"""Patterns from outside: they mean what `re` means, and none of them goes on for ever."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distquant import patterns
from distquant.config import Bnb4bitConfig, CompressedTensorsConfig, GptqConfig
from distquant.config.pattern_places import places_of
from distquant.config.selection import matches
from distquant.errors import InputError
from distquant.patterns import InvalidPattern, Pattern, compiled, limited_matching, most_steps, pattern_error

OF_THE_FIELD = (
    "lm_head", r"model\.layers\.(0|1|2)\..*", r".*\.([0-9]|1[0-5])\..*up_proj$", r".*mlp\.gate$", r".*router.*",
    r"^(?!.*(q_proj|k_proj)).*$", r".*visual.*", r"(?!.*self_attn).*", r"layers\.\d+\.mlp\.down_proj", "projector",
    r".*\.(?:[02468])\..*(?:gate|up|down)_proj", r"model\.layers\.(?:1[0-9]|2[0-3])\.self_attn.*", "re.*attn",
    r".*block_sparse_moe\.gate", r"model.layers.0.mlp.*", r".*linear_attn\.in_proj_[ab]$", r"(?i:VISION).*", "a*", "",
)  # fmt: skip
"""Patterns as configurations in the field have them."""

NAMES = (
    "lm_head", "model.lm_head", "model.layers.0.mlp.up_proj", "model.layers.12.self_attn.q_proj", "model.embed_tokens",
    "model.layers.7.mlp.experts.3.down_proj", "model.visual.blocks.2.attn.qkv", "vision_tower.proj", "a" * 90, "x\ny",
    "model.layers.0.block_sparse_moe.gate", "model.layers.3.mlp.gate", "language_model.model.layers.9.mlp.router.w", "",
    "model.layers." * 12 + "0.mlp.up_proj",
)  # fmt: skip

ENDLESS = (r"(a|aa)+$", r"(?=(\w|\w\w)+$\b\B)a", r"(\w|\w\w)+!", "(?:a|b|.)?" * 40 + "!", r"(\w?){40}\w{40}!")

PIECES = st.sampled_from(
    ["a", "b", ".", r"\.", r"\w", r"\d", "[a-c]", "[^b]", "[]x]", "[[:a]", "{", "{e<=1}", "{,2}", "a{1,2}", "*", "+",
     "?", "*?", "(a|b)", "(?:ab|a)", "(?!b)", "(?<=a)", "$", "^", "(a)", r"\1", "|", "(?i:A)", "-", "_", r"\b"]
)  # fmt: skip


def agree(text: str, name: str) -> None:
    """A pattern gives `re`'s answers, by both engines."""
    own, slow, known = Pattern(text, text), Pattern(text, text), re.compile(text)
    slow._compile()
    slow._pieces, slow._is_fast = (), False
    for one in (own, slow):
        assert one.match(name) == (known.match(name) is not None), (text, name, one is own)
        assert one.search(name) == (known.search(name) is not None), (text, name, one is own)


@pytest.mark.parametrize("text", OF_THE_FIELD)
def test_a_pattern_of_the_field_means_what_re_means(text: str) -> None:
    for name in NAMES:
        agree(text, name)


@pytest.mark.parametrize("text", OF_THE_FIELD)
def test_a_pattern_of_the_field_is_matched_fast(text: str) -> None:
    assert most_steps(text) <= patterns.FAST_STEPS


@given(st.lists(PIECES, max_size=5).map("".join), st.text("ab.1_\n{e<=A", max_size=8))
@settings(max_examples=300)
def test_any_pattern_means_what_re_means(text: str, name: str) -> None:
    try:
        re.compile(text)
    except re.error:
        assert pattern_error(text) is not None
        return
    agree(text, name)


@pytest.mark.parametrize("text", ENDLESS[:2])
def test_an_endless_pattern_is_an_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "ONE_SECONDS", 0.05)
    with pytest.raises(InputError, match=r"takes more than 0\.05 s"):
        compiled(text).match("a" * 60 + "b")


@pytest.mark.parametrize(
    "text", [*ENDLESS, r"(a+)+$", r"(?:a*)*", r"(a)\1", ".*.*.*.*x", "(a|b)(a|b)?" * 20, "[*](a+)+", r"\)(a+)*"]
)
def test_an_endless_pattern_is_not_matched_by_re(text: str) -> None:
    assert most_steps(text) > patterns.FAST_STEPS


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(" * 5000 + ")" * 5000, "nested too deeply"),
        ("a{99999999999999999999}", "repetition number is too large"),
        ("a{" + "9" * 5000 + "}", "4300 digits"),
        ("((a{1000}){1000}){1000}", "23000000000 characters"),
        ("x" * 10_001, "10001 characters, and at most 10000"),
        ("(?L)a", "cannot use 'L' flag"),
        ("[", "unterminated"),
    ],
)
def test_a_text_that_is_no_pattern_has_a_reason(text: str, reason: str) -> None:
    error = pattern_error(text)
    assert error is not None and reason in error
    with pytest.raises(InvalidPattern):
        compiled(text)


def test_all_patterns_together_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "ALL_SECONDS", 0.01)
    with limited_matching(lambda given: "here"), pytest.raises(InputError, match=r"^here: the patterns take more than"):
        for number in range(10**6):
            compiled(rf"(?:.*x)+{number % 100}").match("model.layers.0.mlp.up_proj")


CONFIGS = {
    "llm_int8_skip_modules": Bnb4bitConfig(llm_int8_skip_modules=["lm_head", r"(a|aa)+$"]),
    "dynamic": GptqConfig(bits=4, group_size=32, dynamic={r"-:(a|aa)+$": {}}),
    "ignore": CompressedTensorsConfig(ignore=[r"re:(a|aa)+$"]),
}


@pytest.mark.parametrize("field", CONFIGS)
def test_the_place_of_a_pattern_is_named(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "ONE_SECONDS", 0.05)
    config = CONFIGS[field]
    with (
        limited_matching(places_of(config)),
        pytest.raises(InputError, match=rf"^quantization_config\.{field}: '\(a"),
    ):
        compiled(r"(a|aa)+$").match("a" * 60 + "b")
    # compressed-tensors puts more around it.
    pattern = (CONFIGS["ignore"].selection.skip or ())[0] if field == "ignore" else r"(a|aa)+$"
    with limited_matching(places_of(config)), pytest.raises(InputError, match=rf"^quantization_config\.{field}: "):
        matches(pattern, "a" * 60 + "b")
