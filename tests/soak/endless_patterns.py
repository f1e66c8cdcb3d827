"""Patterns that never end, wherever a checkpoint or a user gives one: `python tests/soak/endless_patterns.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huge_numbers import Argv, Case, asked, main, with_config

ENDLESS = (
    r"(a|aa)+$",
    r"(\w|\w\w)+!",
    r"(a+)+$",
    r"(.*)*x",
    r"((\w+\.)*)*\d\d\d$",
    r"(?:.*.*)*.*.*.*x$",
    r"(?:\w|[a-z])*!",
    r"(?:[a-z_]|[a-z_.0-9])*(?:[a-z_]|[a-z_.0-9])*#",
    r"(?=(\w|\w\w)+!)model",
    r"(?!(\w|.)*!)model",
    r"(\w?){40}\w{40}!",
    r"^(([a-z_.0-9])+.)+[A-Z]([a-z_.0-9])+$",
    r"(.|\w)*\1!",
    r"(?:(?:\w*)*)*!",
    "(?:a|b|.)?" * 40 + "!",
    ".*" * 30 + "!",
    "(.|m)(.|o)" * 20 + "!",
)
"""Patterns on which a matcher that tries all ways goes on for ever, or does so on long names."""

INVALID = (
    "(" * 5000 + ")" * 5000,
    "a{99999999999999999999}",
    "a{" + "9" * 5000 + "}",
    "((a{1000}){1000}){1000}",
    "(a{65535}){65535}",
    "(?L)a",
    "(?au)a",
    "[",
    "x" * 1_000_000,
    "|" * 100_000,
    "\\",
    "(?P<a>b)(?P<a>c)",
)
"""Texts that are not patterns, or would take too much to compile."""

LISTS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "bitsandbytes skip": lambda each: {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": each,
    },
    "fp8 skip": lambda each: {"quant_method": "fp8", "modules_to_not_convert": each},
    "hqq skip": lambda each: {
        "quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}},
        "skip_modules": each,
    },
    "awq skip": lambda each: {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "modules_to_not_convert": each,
    },
    "gptq dynamic": lambda each: {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {f"-:{one}": {} for one in each},
    },
    "gptq rules": lambda each: {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {f"+:{one}": {"bits": 8} for one in each},
    },
    "auto-round": lambda each: {
        "quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_gptq",
        "extra_config": {one: {"bits": 8} for one in each},
    },
    "compressed-tensors ignore": lambda each: _compressed(["Linear"], [f"re:{one}" for one in each]),
    "compressed-tensors targets": lambda each: _compressed([f"re:{one}" for one in each], []),
    "include_modules": lambda each: {"quant_method": "bitsandbytes", "load_in_8bit": True, "include_modules": each},
}  # fmt: skip
"""Places of patterns, and the quantization config that has them there."""


def _compressed(targets: list[str], ignore: list[str]) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    group = {"targets": targets, "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "format": "float-quantized",
        "ignore": ignore,
    }  # fmt: skip


def stored(config: dict[str, Any]) -> Callable[[Path], Argv]:
    """Returns a case in which the checkpoint has a quantization config."""
    return with_config(lambda given: json.dumps({**given, "quantization_config": config}))


def cases() -> Iterator[Case]:
    """Yields all cases."""
    for place, config_of in LISTS.items():
        for pattern in (*ENDLESS, *INVALID):
            yield "patterns that a user gives", f"{place}: {pattern[:40]}", asked(json.dumps(config_of([pattern])))
        for pattern in ENDLESS[::4]:
            yield "patterns in a checkpoint", f"{place}: {pattern[:40]}", stored(config_of([pattern]))
        many = {
            "20,000 names": [f"model.layers.{number}.mlp.none" for number in range(20_000)],
            "20,000 patterns": [f".*{number}.*x.*" for number in range(20_000)],
            "2,000 slow ones": [rf"(?:\w|{number})*(?:.|\w)*!" for number in range(2_000)],
        }
        for name, patterns in many.items():
            yield "many patterns", f"{place}: {name}", asked(json.dumps(config_of(patterns)))
            yield "many patterns", f"{place}, stored: {name}", stored(config_of(patterns))
    for key in ("base_model_tp_plan", "tp_plan", "_keep_in_fp32_modules", "base_model_ep_plan"):
        for pattern in ENDLESS[:6]:
            text = json.dumps({pattern: "colwise"} if "plan" in key else [pattern])
            made = with_config(lambda given, key=key, text=text: json.dumps({**given, key: json.loads(text)}))
            yield "patterns in config.json", f"{key}: {pattern}", _divided(made)


def _divided(make: Callable[[Path], Argv]) -> Callable[[Path], Argv]:
    return lambda folder: (*make(folder), "--mesh", "tp=2")


if __name__ == "__main__":
    sys.exit(main(list(cases()), sys.argv[1:]))
