"""A checkpoint's own `quantization_config` is evidence of how it was made, and is read more kindly than a user's.

Tools write keys and words of their own. Here are, in one place each: other words for the same thing, and keys that
change what the stored bytes mean. Any other key that is unknown is kept, and a note of the plan names it.

Seen in files of: GPTQModel, AutoGPTQ, AutoAWQ, AutoRound, llm-compressor, AutoFP8, ModelOpt, torchao, hqq, unsloth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from distquant.config.checks import where
from distquant.config.plain import plain
from distquant.errors import InputError, Problem

METHODS: Mapping[str, str] = {
    "auto_gptq": "gptq",
    "gptq_marlin": "gptq",
    "gptqmodel": "gptq",
    "autoawq": "awq",
    "awq_marlin": "awq",
    "auto_round": "auto-round",
    "autoround": "auto-round",
    "compressed_tensors": "compressed-tensors",
}
"""Other words for methods: of kernels that read the same files, of tools, with another dash."""

_GROUPED = {
    "groupsize": "group_size",
    "q_group_size": "group_size",
    "wbits": "bits",
    "w_bit": "bits",
    "symmetric": "sym",
    "act_order": "desc_act",
    "actorder": "desc_act",
}

KEYS: Mapping[str, Mapping[str, str]] = {
    "gptq": _GROUPED,
    "awq": _GROUPED,
    "auto-round": {old: new for old, new in _GROUPED.items() if new != "desc_act"},
    "fp8": {"act_scheme": "activation_scheme", "block_size": "weight_block_size"},
}
"""Method -> another word for a key -> the key."""

_FLOAT8 = dict.fromkeys(("e4m3fn", "float8_e4m3", "float8_e4m3fn", "f8_e4m3", "torch.float8_e4m3fn"), "e4m3")
_SCALES = {"e8m0": "ue8m0", "float8_e8m0fnu": "ue8m0", "fp32": "float", "float32": "float"}

VALUES: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    # Kernels that repack GPTQ's own files when they load them.
    "gptq": {"format": dict.fromkeys(("gptq_marlin", "auto_gptq", "exllama", "exllama_v2", "exllamav2"), "gptq")},
    # AutoAWQ's kernels for inference alone: `WQLinear_Exllama` and `WQLinear_IPEX` read the gemm layout.
    "awq": {"format": dict.fromkeys(("exllama", "exllama_v2", "exllamav2", "ipex", "awq_marlin"), "gemm")},
    "fp8": {"fmt": _FLOAT8, "scale_fmt": _SCALES},
    "mxfp8": {"fmt": _FLOAT8, "scale_fmt": _SCALES},
}
"""Method -> key -> another word for a value, in lower case -> the value."""

_ROTATED = "inputs must be rotated in every forward, which is not done here"
_SPARSE = "the stored weights are sparse, which is not supported"
_SCALED = "inputs must be scaled before each product, which is not done here"
_LOW_RANK = "a product of low rank must be added to each weight, which is not done here"
_ORDERED = "the stored inputs are in another order, which is not supported"
_TWICE = "its scales are quantized in turn, which is not supported"
_TABLE = "codes stand for entries of a table, which is not supported"
_SPLIT_OFF = "some weights are stored apart from the others, which is not supported"

CHANGES_MEANING: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "rotation", "rotation_config", "rotate", "transform_config", "hadamard", "hadamard_config",
            "hadamard_transform", "online_hadamard", "online_rotation", "quarot", "spinquant", "spinquant_config",
        ),
        _ROTATED,
    ),  # GPTQModel pull request 2980, auto-round 1607
    **dict.fromkeys(("sparsity", "sparsity_config", "sparse_config"), _SPARSE),
    **dict.fromkeys(("pre_quant_scale", "has_pre_quant_scale"), _SCALED),  # ModelOpt's AWQ
    **dict.fromkeys(("low_rank", "low_rank_config", "svd_rank", "lqer_rank"), _LOW_RANK),
    **dict.fromkeys(("channel_permutation", "input_permutation", "permute_inputs"), _ORDERED),
    **dict.fromkeys(("super_bits", "super_group_size", "scale_quant_params", "zero_quant_params"), _TWICE),
    **dict.fromkeys(("codebook", "codebooks", "codebook_size", "lookup_table", "lut"), _TABLE),
    **dict.fromkeys(("outliers", "outlier_columns", "num_outlier_columns"), _SPLIT_OFF),
    "bias_corrected": "products get biases that the model does not have",
    "bias_correction": "products get biases that the model does not have",
    "awq_gemm_checkpoint": "codes are packed as AWQ packs them; then quant_method must be 'awq'",
    "is_awq_gemm_checkpoint": "codes are packed as AWQ packs them; then quant_method must be 'awq'",
    "data_type": "codes are not integers",
    "bnb_4bit_blocksize": "blocks of another size than 64 are not supported",
    "zeros_mode": "zero points are stored in another form, which is not supported",
}  # fmt: skip
"""Key -> the reason why it changes what the stored bytes mean. Any key that is unknown and not here does not."""

_HARMLESS: Mapping[str, Callable[[Any], bool]] = {
    "data_type": lambda value: isinstance(value, str) and value.lower().startswith("int"),
    "bnb_4bit_blocksize": lambda value: value == 64,
    "sparsity_config": lambda value: isinstance(value, Mapping) and value.get("format") == "dense",
}


def named(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a stored configuration with its method under `quant_method`, by the usual name.

    GPTQModel 6 and 7 write `method` beside `quant_method`.

    Raises:
        InputError: both are there and name different methods.
    """
    rest = {key: value for key, value in given.items() if key != "method"}
    method, other = plain(given.get("quant_method")), plain(given.get("method"))
    if isinstance(method, str):
        rest["quant_method"] = method_of(method)
    if not isinstance(other, str):
        return rest if other is None else {**rest, "method": other}
    if method is not None and rest["quant_method"] != method_of(other):
        fix = "Correct the checkpoint's config.json: one of them is wrong."
        raise InputError.one(where("method"), f"{other!r} contradicts quant_method={method!r}", fix)
    return {**rest, "quant_method": method_of(other)}


def method_of(word: str) -> str:
    """Returns the usual name of a method."""
    return METHODS.get(word.lower(), word)


def usual_values(given: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Returns a stored configuration with the usual words for values."""
    words = VALUES.get(method, {})
    return {
        key: words[key].get(value.lower(), value) if key in words and isinstance(value, str) else value
        for key, value in given.items()
    }


def changed_meaning(key: str, value: Any) -> Problem | None:
    """Returns a problem if a key, whose last part may follow dots, changes what the stored bytes mean."""
    name = key.rpartition(".")[2]
    reason = CHANGES_MEANING.get(name)
    if reason is None or not value or (isinstance(value, str) and value.lower() in ("none", "no", "false")):
        return None
    if name in _HARMLESS and _HARMLESS[name](value):
        return None
    return Problem(where(key), f"{value!r}: {reason}", "Take a checkpoint without it, or quantize the original.")


def without_unknown(given: Any, known: Iterable[str], path: str, unknown: dict[str, Any]) -> Any:
    """Returns a nested object without the keys that are not known; moves these to `unknown`, under dotted paths."""
    if not isinstance(given, Mapping):
        return given
    known = frozenset(known)
    unknown.update({f"{path}.{key}": value for key, value in given.items() if key not in known})
    return {key: value for key, value in given.items() if key in known}


def put_back(written: dict[str, Any], path: str, value: Any) -> None:
    """Puts a value that was unknown back in its place; at the top, where that place is not written."""
    place: Any = written
    *parents, leaf = path.split(".")
    for part in parents:
        place = place.get(part) if isinstance(place, dict) else None
    if isinstance(place, dict):
        place[leaf] = value
    else:
        written[path] = value
