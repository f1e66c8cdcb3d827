"""Hostile JSON beside the weights: wrong types in each field of config.json and of the files that go with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from spoiled import DATA, KJV, Input, write_json

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
