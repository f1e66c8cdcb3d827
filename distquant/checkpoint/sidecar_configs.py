"""Quantization configs that lie in files of their own beside a config.json which names no quantization.

| file | written by | read as |
|---|---|---|
| `quanto_qmap.json` | optimum-quanto | quanto |
| `quantize_config.json` | AutoGPTQ, gptqmodel; some AWQ checkpoints | GPTQ or AWQ |
| `quant_config.json` | AutoAWQ before 0.1.8, and llm-awq | AWQ |
| `hf_quant_config.json` | NVIDIA ModelOpt | FP8, where that is its algorithm |

One is only read if tensors are stored in its form: a finetuned or merged model often keeps the file of another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from distquant.checkpoint.faults import Faults, HeaderFault, shown
from distquant.files import CONFIG_BYTES, read_file
from distquant.strict_json import parse_json

CONFIG_NAME = "config.json"
QUANTO_MAP_NAME = "quanto_qmap.json"
KEY = "quantization_config"


def read_config(folder: Path, faults: Faults, name: str = CONFIG_NAME) -> dict[str, Any]:
    """Returns the JSON object of a file; an empty one after adding a fault."""
    try:
        config = parse_json(read_file(folder / name, CONFIG_BYTES))
    except FileNotFoundError:
        reason = f"is missing in {folder}"
        faults.add(HeaderFault.CONFIG_MISSING, name, reason, fix=f"Put the model's {name} there")
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
        faults.add(HeaderFault.UNREADABLE, name, reason, fix=f"Put the model's {name} there, readable")
    except ValueError as error:
        faults.add(HeaderFault.CONFIG_NOT_JSON, name, f"is not JSON ({error})")
    else:
        if isinstance(config, dict):
            return config
        faults.add(HeaderFault.CONFIG_NOT_JSON, name, f"is {shown(config)}, not a JSON object")
    return {}


def add_sidecar(folder: Path, config: dict[str, Any], names: Collection[str], faults: Faults) -> str | None:
    """Puts a quantization config that lies beside config.json into it; returns a note, or None if there is none.

    Args:
        folder: of the checkpoint.
        config: the parsed config.json; changed.
        names: of the checkpoint's tensors.
        faults: gets files that cannot be read, or do not say enough.
    """
    text = config.get("text_config")
    if any(
        part.get(KEY) or part.get("compression_config") for part in (config, text if isinstance(text, dict) else {})
    ):
        return None
    if KEY not in config and os.path.lexists(folder / QUANTO_MAP_NAME):
        config[KEY] = _of_quanto_map(folder, faults)
        return None
    leaves = {name.rpartition(".")[2] for name in names}
    for name, (suffix, convert) in SIDECARS.items():
        if suffix not in leaves or not os.path.lexists(folder / name):
            continue
        found = convert(read_config(folder, faults, name))
        if found is None:
            reason = "does not say how the weights are quantized, and config.json has no quantization_config"
            fix = f"Put a complete {KEY} into config.json"
            faults.add(HeaderFault.CONFIG_INCOMPLETE, name, reason, fix=fix)
            return None
        config[KEY] = found
        return f"quantization from {name}: config.json names none, and tensors are stored quantized ({suffix})"
    return None


def _of_quanto_map(folder: Path, faults: Faults) -> dict[str, Any]:
    """Converts optimum-quanto's map of quantized modules into a `quantization_config`.

    The map is a file beside config.json: module -> {"weights": "qint8", "activations": "none"}. It is written by
    `QuantizedModelForCausalLM` (0.2.7, `models/transformers_models.py`).
    """
    entries_by_module = read_config(folder, faults, QUANTO_MAP_NAME)
    entries = [entry for entry in entries_by_module.values() if isinstance(entry, dict)]
    if len(entries) < len(entries_by_module):
        faults.add(HeaderFault.CONFIG_NOT_JSON, QUANTO_MAP_NAME, "has entries that are not JSON objects")
    weights = sorted({str(entry.get("weights")).removeprefix("q") for entry in entries})
    activations = sorted({str(entry.get("activations")).removeprefix("q") for entry in entries} - {"none", "None"})
    names = {"float8_e4m3fn": "float8"}
    # Precisions that differ between modules are joined by commas: no configuration allows such a value, so that the
    # check of its fields rejects it and names them all.
    return {
        "quant_method": "quanto",
        "weights": ", ".join(names.get(kind, kind) for kind in weights),
        "activations": ", ".join(names.get(kind, kind) for kind in activations) or None,
        "modules_to_not_convert": [],
        "include_modules": sorted(entries_by_module),
    }


_OLD_AWQ = {"w_bit": "bits", "q_group_size": "group_size"}
"""AutoAWQ's own names of fields -> those of transformers."""


def _of_gptq_or_awq(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the config of a `quantize_config.json` or `quant_config.json`; None if it lacks bits or group size."""
    config = {_OLD_AWQ.get(key, key): value for key, value in given.items()}
    if "groupsize" in config:  # GPTQ-for-LLaMa
        config.setdefault("group_size", config.pop("groupsize"))
    if not {"bits", "group_size"} <= config.keys():
        return None
    method = config.get("quant_method") or ("awq" if "zero_point" in config else "gptq")
    return {**config, "quant_method": method}


def _of_modelopt(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the config of ModelOpt's file, where its weights are FP8 with one scale each.

    Other algorithms keep their name, so that the refusal of the method can tell it.
    """
    quantization = given.get("quantization")
    algorithm = quantization.get("quant_algo") if isinstance(quantization, Mapping) else None
    if not isinstance(quantization, Mapping) or not isinstance(algorithm, str):
        return None
    if algorithm.upper() != "FP8":
        return {"quant_method": f"modelopt {algorithm}"}
    return {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "weight_block_size": None,
        "modules_to_not_convert": quantization.get("exclude_modules") or [],
        "kv_cache_quant_algo": quantization.get("kv_cache_quant_algo"),
    }


SIDECARS: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], dict[str, Any] | None]]] = {
    "quantize_config.json": ("qweight", _of_gptq_or_awq),
    "quant_config.json": ("qweight", _of_gptq_or_awq),
    "hf_quant_config.json": ("weight_scale", _of_modelopt),
}
"""File -> the last part of a tensor's name by which its form is known, and what reads it; the first one counts."""
