"""The fields of `generation_config.json` that `generate` of transformers uses: types and ranges, known before a load.

transformers (5.23, `generation/configuration_utils.py` and `logits_process.py`) reads any value, and fails once it
generates: after the load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from distquant.checkpoint.faults import shown
from distquant.errors import Problem

NAME = "generation_config.json"

INT64 = 2**63
"""Tokens are 64-bit integers."""


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value < INT64


def _number(least: float, most: float = float("inf"), open_end: bool = False) -> Callable[[Any], bool]:
    """Returns a test for a number from `least` (itself left out if `open_end`) to `most`; NaN and infinity are none."""

    def test(value: Any) -> bool:
        within = type(value) in (int, float) and least <= value <= most and abs(value) < float("inf")
        return within and not (open_end and value == least)

    return test


def _flag(value: Any) -> bool:
    return type(value) is bool or (type(value) is int and value in (0, 1))


def _token(value: Any) -> bool:
    return type(value) is int and -1 <= value < INT64  # some configurations have -1 for none


def _tokens(value: Any) -> bool:
    return isinstance(value, list) and all(map(_token, value))


def _token_or_tokens(value: Any) -> bool:
    return _token(value) or (_tokens(value) and len(value) > 0)


def _phrases(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(_tokens(phrase) and phrase for phrase in value)


def _texts(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return all(isinstance(text, str) and text for text in texts)


def _biases(value: Any) -> bool:
    pairs = value if isinstance(value, list) else []
    return bool(pairs) and all(
        isinstance(pair, list) and len(pair) == 2 and _tokens(pair[0]) and pair[0] and _number(-INT64)(pair[1])
        for pair in pairs
    )


_Rule = tuple[Callable[[Any], bool], str]

_FLAG: _Rule = (_flag, "true or false")
_TOKEN: _Rule = (_token, "a token's number")
_TOKENS: _Rule = (_tokens, "a list of tokens' numbers")
_ENDS: _Rule = (_token_or_tokens, "a token's number, or a list of them")
_PHRASES: _Rule = (_phrases, "a list of lists of tokens' numbers")
_FROM_0: _Rule = (_whole(0), "an integer from 0")
_FROM_1: _Rule = (_whole(1), "an integer from 1")
_SHARE: _Rule = (_number(0, 1), "a number from 0 to 1")
_ABOVE_0: _Rule = (_number(0, open_end=True), "a number above 0")
_NUMBER: _Rule = (_number(-INT64), "a number")

FIELDS: Mapping[str, _Rule] = {
    **dict.fromkeys(
        ("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "token_healing", "output_attentions",
         "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "low_memory",
         "is_assistant", "use_mtp", "disable_compile"),
        _FLAG,
    ),
    **dict.fromkeys(("max_length", "max_new_tokens", "num_beams", "num_return_sequences", "num_beam_groups"), _FROM_1),
    **dict.fromkeys(
        ("min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
         "prompt_lookup_num_tokens", "max_matching_ngram_size", "max_cache_len", "prefill_chunk_size"),
        _FROM_0,
    ),
    **dict.fromkeys(("top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"), _SHARE),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "max_time"), _ABOVE_0),
    **dict.fromkeys(("length_penalty", "diversity_penalty", "guidance_scale", "penalty_alpha"), _NUMBER),
    "temperature": (_number(0), "a number from 0"),
    "bos_token_id": _ENDS, "eos_token_id": _ENDS, "pad_token_id": _TOKEN, "decoder_start_token_id": _ENDS,
    "forced_bos_token_id": _TOKEN, "forced_eos_token_id": _ENDS,
    "suppress_tokens": _TOKENS, "begin_suppress_tokens": _TOKENS,
    "bad_words_ids": _PHRASES, "force_words_ids": _PHRASES,
    "stop_strings": (_texts, "a text, or a list of texts"),
    "sequence_bias": (_biases, "a list of pairs: tokens' numbers, and a number"),
    "cache_implementation": (lambda value: isinstance(value, str), "the name of a cache"),
    "early_stopping": (lambda value: _flag(value) or value == "never", "true, false or 'never'"),
}  # fmt: skip
"""Field -> a test of its value, and what it takes in words. null is always allowed: it means the default."""

IN_VOCABULARY = (
    "forced_bos_token_id",
    "forced_eos_token_id",
    "decoder_start_token_id",
    "bad_words_ids",
    "sequence_bias",
)
"""Fields of which a token past the vocabulary makes `generate` fail."""


def generation_problems(config: Any, vocabulary: int | None) -> Iterator[Problem]:
    """Yields the fields of a `GenerationConfig` that `generate` cannot work with.

    Args:
        config: as transformers has read it.
        vocabulary: entries of the model's vocabulary; None if it is not known.
    """
    for name, (test, words) in FIELDS.items():
        value = getattr(config, name, None)
        if value is None:
            continue
        if not test(value):
            yield Problem(
                f"{NAME}: {name}", f"is {shown(value)}, not {words}", "Correct it, or take it out of the file"
            )
        elif name in IN_VOCABULARY and vocabulary is not None and (past := max(_flat(value), default=0)) >= vocabulary:
            fault = f"names the token {past}, and the vocabulary has {vocabulary} entries"
            yield Problem(f"{NAME}: {name}", fault, "Correct it, or take it out of the file")


def _flat(value: Any) -> Iterator[int]:
    """Yields all integers of nested lists."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, list):
            yield from _flat(item)
        elif type(item) is int:
            yield item
