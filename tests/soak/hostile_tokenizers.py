"""Hostile files that make text: of a tokenizer, of generation, chat templates, and the configs of adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from hostile_configs import WRONG, leaves, of_fields, set_field
from spoiled import KJV, PROMPT, Input, write, write_json

PROMPTED = (("load", "MODEL", *PROMPT),)

TEMPLATES = {
    "endless": "{% for i in range(10**12) %}{{ i }}{% endfor %}",
    "huge": "{{ 'a' * 10**11 }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "division": "{{ 1 // 0 }}",
    "undefined": "{{ a.b.c }}",
    "syntax": "{% if",
    "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "raise": "{{ raise_exception('\x1b[2J no') }}",
    "escape": "\x1b[2J{{ messages[0].content }}",
    "surrogate": "\ud800{{ messages[0].content }}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "unknown filter": "{{ messages | nothing }}",
    "key": "{{ messages[99]['content'] }}",
    "type": "{{ messages + 1 }}",
    "wide format": "{{ '%999999999999d' % 1 }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "date": "{{ strftime_now('\ud800') }}",
    "index": "{{ [][0] }}",
    "empty": "",
}
"""Chat templates."""


def tokenizers() -> Iterator[Input]:
    """Yields wrong types in what a tokenizer and generation are made of, and templates that do harm."""
    generation = {
        "max_new_tokens": 4,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 5,
        "do_sample": True,
        "num_beams": 1,
        "stop_strings": None,
        "max_length": 20,
        "repetition_penalty": 1.0,
        "suppress_tokens": None,
        "cache_implementation": None,
        "bad_words_ids": None,
        "forced_eos_token_id": None,
        "sequence_bias": None,
        "watermarking_config": None,
        "num_return_sequences": 1,
        "min_p": None,
    }
    for name in ("generation_config.json", "tokenizer_config.json"):
        document = json.loads((KJV / name).read_text()) | (
            generation
            if name[0] == "g"
            else {
                "add_bos_token": True,
                "added_tokens_decoder": {},
                "extra_special_tokens": {},
                "chat_template": "a",
                "auto_map": {},
            }
        )
        yield from of_fields(name, KJV, name, document, commands=PROMPTED)
        for label, value in WRONG.items():
            yield Input(
                name, f"all of it {label}", KJV, lambda folder, n=name, v=value: write_json(folder / n, v), PROMPTED
            )
        for label, raw in (
            ("binary", b"\xff\x00\x80"),
            ("deep", b"[" * 100_000),
            ("nothing", b""),
            ("UTF-16", "{}".encode("utf-16")),
        ):
            yield Input(name, label, KJV, lambda folder, n=name, v=raw: write(folder / n, v), PROMPTED)
    document = json.loads((KJV / "tokenizer.json").read_text())
    for path in leaves({key: value for key, value in document.items() if key != "model"}):
        for label, value in WRONG.items():
            yield Input(
                "tokenizer.json",
                f"{'.'.join(map(str, path))}={label}",
                KJV,
                partial(set_field, "tokenizer.json", path, value),
                PROMPTED,
            )
    for key in document["model"]:
        for label, value in WRONG.items():
            yield Input(
                "tokenizer.json",
                f"model.{key}={label}",
                KJV,
                partial(set_field, "tokenizer.json", ("model", key), value),
                PROMPTED,
            )
    for label, text in TEMPLATES.items():
        yield Input(
            "chat template", label, KJV, lambda folder, t=text: write(folder / "chat_template.jinja", t), PROMPTED
        )

    def past(folder: Path) -> None:
        """Adds a token past the model's vocabulary."""
        document = json.loads((folder / "tokenizer.json").read_text())
        token = {
            "id": 5000,
            "content": "In the",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": False,
        }
        document["added_tokens"].append(token)
        document["model"]["vocab"]["In the"] = 5000
        write_json(folder / "tokenizer.json", document)

    yield Input("tokenizer.json", "a token past the vocabulary", KJV, past, PROMPTED)


def adapters() -> Iterator[Input]:
    """Yields adapters whose configuration has wrong types."""
    good = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": False,
        "task_type": "CAUSAL_LM",
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "use_dora": False,
        "exclude_modules": None,
        "layers_pattern": None,
    }

    def beside(value: Any, folder: Path) -> None:
        (folder / "adapter").mkdir()
        write_json(folder / "adapter" / "adapter_config.json", value)
        (folder / "adapter" / "adapter_model.safetensors").symlink_to(KJV / "model-00001-of-00003.safetensors")

    both = (("load", "MODEL", "--adapter", "COPY/adapter"),)
    for label, value in WRONG.items():
        yield Input("adapter", f"all of it {label}", KJV, partial(beside, value), both)
        for key in good:
            yield Input("adapter", f"{key}={label}", KJV, partial(beside, {**good, key: value}), both)
