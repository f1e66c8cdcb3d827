"""Hostile JSON beside the weights: wrong types in each field of config.json and of the files that go with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from spoiled import DATA, KJV, PROMPT, Input, write, write_json

WRONG: dict[str, Any] = {
    "null": None,
    "true": True,
    "zero": 0,
    "minus one": -1,
    "2^70": 2**70,
    "fraction": 1.5,
    "NaN": float("nan"),
    "infinite": float("inf"),
    "word": "word",
    "empty": "",
    "lone surrogate": "\ud800",
    "escape": "\x1b[2J\x07",
    "list": [],
    "nested": [[{"a": [None]}]],
    "object": {},
    "map": {"a": {"b": 1}},
}
"""Values, of which most fields take at most two."""

FAMILIES = ("gemma2", "neox-per-head", "qwen3-head-norms", "phi3-packed", "gpt-oss", "lfm2")
"""Families of `models.py` whose configs are spoiled beside that of the example."""

QUANTIZED = (
    "gptq/v1-4bit",
    "awq/gemm",
    "auto_round/auto_gptq",
    "fp8/blocks",
    "fbgemm_fp8",
    "mxfp8",
    "hqq/4-bits",
    "quanto/int8",
    "torchao/int8-row",
    "torchao/int4-group",
    "compressed_tensors/int4",
    "compressed_tensors/fp8-block",
)
"""Checkpoints of other tools in the tests' data."""

BNB = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_use_double_quant": False,
    "llm_int8_threshold": 6.0,
    "llm_int8_skip_modules": None,
    "bnb_4bit_quant_storage": "uint8",
}


def set_field(name: str, path: tuple[Any, ...], value: Any, folder: Path) -> None:
    """Sets a field of a JSON file, found by keys and indices."""
    document = json.loads((folder / name).read_text())
    place = document
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    write_json(folder / name, document)


def leaves(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the path of each field of nested objects, these included; of a list the first entry."""
    for key in document if isinstance(document, dict) else range(min(len(document), 1)):
        yield (*path, key)
        if isinstance(document[key], (dict, list)):
            yield from leaves(document[key], (*path, key))


def of_fields(
    kind: str, base: Path, name: str, document: Any, prefix: tuple[Any, ...] = (), **more: Any
) -> Iterator[Input]:
    """Yields an input for each field of a document in a file, and each wrong value."""
    for path in leaves(document):
        for label, value in WRONG.items():
            where = ".".join(map(str, (*prefix, *path)))
            yield Input(
                kind,
                f"{base.name} {name} {where}={label}",
                base,
                partial(set_field, name, (*prefix, *path), value),
                **more,
            )


def configs(model_of: Callable[[str], str]) -> Iterator[Input]:
    """Yields wrong types in config.json of the example and of some families."""
    for base in (KJV, *(Path(model_of(family)) for family in FAMILIES)):
        document = json.loads((base / "config.json").read_text())
        yield from of_fields("config.json", base, "config.json", document)
    for label, value in WRONG.items():
        yield Input(
            "config.json",
            f"all of it {label}",
            KJV,
            lambda folder, value=value: write_json(folder / "config.json", value),
        )
        yield Input(
            "config.json", f"text_config {label}", KJV, partial(set_field, "config.json", ("text_config",), value)
        )
        for key in (
            "rope_scaling",
            "layer_types",
            "sliding_window",
            "torch_dtype",
            "auto_map",
            "id2label",
            "quantization_config",
            "compression_config",
            "num_local_experts",
            "label2id",
            "base_model_tp_plan",
            "_attn_implementation",
            "per_layer_config",
            "vision_config",
            "use_bfloat16",
            "is_encoder_decoder",
            "tp_plan",
            "name_or_path",
        ):
            yield Input("config.json", f"{key} {label}", KJV, partial(set_field, "config.json", (key,), value))


def quantization_configs() -> Iterator[Input]:
    """Yields wrong types in the quantization_config of several methods."""
    for which in QUANTIZED:
        base = DATA / which
        document = json.loads((base / "config.json").read_text()).get("quantization_config")
        if document is not None:
            yield from of_fields("quantization_config", base, "config.json", document, ("quantization_config",))
    for key in BNB:
        for label, value in WRONG.items():
            changed = {**BNB, key: value}
            yield Input(
                "quantization_config",
                f"bitsandbytes {key}={label}",
                KJV,
                partial(set_field, "config.json", ("quantization_config",), changed),
            )


def sidecars() -> Iterator[Input]:
    """Yields wrong types in the files that hold a quantization config of their own."""
    gptq = json.loads((DATA / "gptq/v1-4bit/config.json").read_text())["quantization_config"]

    def beside(name: str, value: Any, folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        document.pop("quantization_config", None)
        write_json(folder / "config.json", document)
        write_json(folder / name, value)

    for label, value in WRONG.items():
        for key in gptq:
            yield Input(
                "sidecar",
                f"quantize_config.json {key}={label}",
                DATA / "gptq/v1-4bit",
                partial(beside, "quantize_config.json", {**gptq, key: value}),
            )
        yield Input(
            "sidecar", f"quanto_qmap.json {label}", DATA / "quanto/int8", partial(beside, "quanto_qmap.json", value)
        )
        yield Input(
            "sidecar",
            f"quanto_qmap.json entry {label}",
            DATA / "quanto/int8",
            partial(beside, "quanto_qmap.json", {"model.layers.0.mlp.up_proj": value}),
        )
        for key in ("weights", "activations"):
            entry = {"weights": "qint8", "activations": "none", key: value}
            yield Input(
                "sidecar",
                f"quanto_qmap.json {key}={label}",
                DATA / "quanto/int8",
                partial(beside, "quanto_qmap.json", {"model.layers.0.mlp.up_proj": entry}),
            )
        for key in ("quant_algo", "exclude_modules", "kv_cache_quant_algo", "group_size"):
            entry = {"quant_algo": "FP8", "exclude_modules": [], key: value}
            yield Input(
                "sidecar",
                f"hf_quant_config.json {key}={label}",
                DATA / "fp8/tensor",
                partial(beside, "hf_quant_config.json", {"quantization": entry}),
            )


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
