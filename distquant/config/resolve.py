"""Detect, parse, merge: from the user's and the checkpoint's configuration to a single one.

The checkpoint's parameters are immutable. The user overrides loading attributes only; any other difference is an error
that names both values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import Field, fields, replace
from typing import Any, NamedTuple

from distquant.config.base import QuantizationConfig, default_of
from distquant.config.checks import where
from distquant.config.evidence import named
from distquant.config.none import NoneConfig
from distquant.config.plain import plain
from distquant.config.values import did_you_mean, is_json_source, read_json
from distquant.dtypes import LOAD_DTYPES, dtype_name
from distquant.errors import InputError, Problems

_OPTION = "quantization_config"


ON_UNSUPPORTED = ("error", "skip")
"""The choices for a checkpoint with an unknown method."""


SPELLINGS: Mapping[str, str] = {
    **dict.fromkeys(("4bit", "4-bit", "bnb", "bitsandbytes", "bnb-4bit", "bnb-nf4", "load-in-4bit"), "nf4"),
    **dict.fromkeys(("8bit", "8-bit", "bnb-8bit", "bnb-int8", "llm.int8", "llm-int8", "load-in-8bit"), "int8"),
    "w4a16": "int4",
    "fp8-dynamic": "fp8-row",
    **dict.fromkeys(("no", "off", "unquantized"), "none"),
}
"""Other spellings of short names, in lower case and with `-` for `_`.

4 bits of bitsandbytes are `nf4`, the code book that QLoRA and vLLM take. `fp8-dynamic` and `w4a16` are llm-compressor's
names of these schemes.
"""


class Merged(NamedTuple):
    """The configuration to load with; `prequantized` is True if the checkpoint already holds quantized weights."""

    config: QuantizationConfig
    prequantized: bool

    @property
    def dequantize(self) -> bool:
        """True if the checkpoint's quantized weights are loaded as bfloat16."""
        return self.prequantized and self.config.dequantize


def resolve(
    model_config: Mapping[str, Any],
    user: QuantizationConfig | None,
    classes: Iterable[type[QuantizationConfig]],
    on_unsupported: str = "error",
) -> tuple[Merged, dict[str, Any] | None]:
    """Runs `detect`, `parse` and `merge` on a checkpoint's `config.json` and the user's configuration.

    Args:
        model_config: the parsed `config.json`.
        user: the user's configuration, if there is one.
        classes: the known configuration classes.
        on_unsupported: "skip" leaves out a checkpoint's method that is not among them; anything else makes it an error.

    Returns:
        the configuration to load with, and the checkpoint's own if its method is left out.

    Raises:
        InputError: as those; and if a user's method would quantize weights whose own method is left out.
    """
    classes = tuple(classes)
    stored = detect(model_config)
    if stored is None or is_known(stored, classes):
        return merge(parse(stored, classes, stored=True), user), None
    method = plain(stored["quant_method"])
    if on_unsupported != "skip":
        skip = "To plan the checkpoint's tensors as they are stored: on_unsupported='skip' (--on-unsupported skip)."
        fix = f"{_known_methods(method, classes)} {skip}"
        raise InputError.one(where("quant_method"), f"{method!r} is not supported", fix)
    if user is not None and user.dequantize:
        reason = f"weights quantized with {method!r} cannot be dequantized"
        raise InputError.one(where("dequantize"), reason, "Remove it, or take another checkpoint.")
    if user is not None and not isinstance(user, NoneConfig):
        reason = f"{user.to_diff_dict()} cannot quantize weights that {method!r} has quantized, which is skipped"
        raise InputError.one(_OPTION, reason, "Leave quantization_config out, or take an unquantized checkpoint.")
    return Merged(NoneConfig(), prequantized=False), stored


def is_known(given: Mapping[str, Any], classes: Iterable[type[QuantizationConfig]]) -> bool:
    """Returns True if a class is for the method of a dict, or if the dict names none, which `parse` reports."""
    method = plain(given.get("quant_method"))
    return method is None or any(cls.is_for(method) for cls in classes)


def parse(
    given: Any, classes: Iterable[type[QuantizationConfig]], *, stored: bool = False
) -> QuantizationConfig | None:
    """Returns the configuration that `given` means.

    Args:
        given: one of these forms.
            - None, or one of our configurations;
            - one of `transformers` (anything with `to_dict`), or a dict;
            - the path of a JSON file (a `Path`, or a string ending in `.json`), or JSON text;
            - a short name.
        classes: the known configuration classes; the first that matches a dict is taken.
        stored: True for a checkpoint's own configuration, which may have words and keys of other tools.

    Raises:
        InputError: lists every unknown method, name, key or value, with near matches.
    """
    classes = tuple(classes)
    if given is None or isinstance(given, QuantizationConfig):
        return given
    if is_json_source(given):
        given = read_json(given)
    elif isinstance(given, str):
        return _from_short_name(given, classes)
    elif callable(getattr(given, "to_dict", None)) and not isinstance(given, type):
        attributes: dict[str, Any] = getattr(given, "get_loading_attributes", dict)()
        given = {**given.to_dict(), **attributes}  # some of transformers' classes leave these out of their dict
    if not isinstance(given, Mapping):
        fix = "Give a configuration object, a dict, the path of a JSON file, or a short name."
        raise InputError.one(_OPTION, f"{given!r} ({type(given).__name__}) is not a quantization configuration", fix)
    given = named(given) if stored else given
    return _class_for(given, classes).from_dict(given, stored=stored)


def _from_short_name(given: str, classes: tuple[type[QuantizationConfig], ...]) -> QuantizationConfig:
    known = {short: (cls, values) for cls in classes for short, values in cls.short_names.items()}
    name = short_name(given, known)
    if name is None:
        dtype = dtype_name(given)
        if dtype in LOAD_DTYPES:
            fix = f"That is a dtype: give dtype={dtype!r} (--dtype {dtype}), without quantization or with 'none'."
        else:
            fix = f"{did_you_mean(given, known)} Known names: {', '.join(known)}.".strip()
        raise InputError.one(_OPTION, f"unknown quantization {given!r}", fix)
    cls, values = known[name]
    return cls(**values)


def short_name(given: str, known: Collection[str]) -> str | None:
    """Returns the short name among `known` that is meant: in any case, with `_` for `-`, or by another spelling."""
    if given in known:
        return given
    folded = _folded(given)
    names = {_folded(name): name for name in known}
    return names.get(folded) or names.get(SPELLINGS.get(folded, ""))


def respelled(given: Any, known: Collection[str]) -> str | None:
    """Returns the short name that another spelling stands for, or None where a name, or no text at all, is given."""
    if not isinstance(given, str) or is_json_source(given):
        return None
    name = short_name(given, known)
    return None if name is None or _folded(name) == _folded(given) else name


def _folded(name: str) -> str:
    return "-".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _class_for(given: Mapping[str, Any], classes: tuple[type[QuantizationConfig], ...]) -> type[QuantizationConfig]:
    for cls in classes:
        if cls.matches(given):
            return cls
    method = plain(given.get("quant_method"))
    markers = [f"{cls.marker}=True" for cls in classes if cls.is_for(method) and cls.marker]
    if markers:
        raise InputError.one(_OPTION, f"{method!r} does not say which kind is meant", f"Add {' or '.join(markers)}.")
    reason = "is missing" if method is None else f"{method!r} is not supported"
    raise InputError.one(where("quant_method"), reason, _known_methods(method, classes))


def _known_methods(method: Any, classes: Iterable[type[QuantizationConfig]]) -> str:
    """Returns advice: near matches of a method, and all known ones."""
    known = list(dict.fromkeys(cls.quant_method for cls in classes))
    near = did_you_mean(method, known) if method is not None else ""
    return f"{near} Known methods: {', '.join(known)}.".strip()


def detect(model_config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the quantization config in a checkpoint's `config.json`, or None if its weights are not quantized.

    Its key is `quantization_config` (older compressed-tensors: `compression_config`), at the top or in `text_config`.

    Raises:
        InputError: it is not an object, or two places contradict each other.
    """
    stored: dict[str, dict[str, Any]] = {}
    for prefix, part in (("", model_config), ("text_config.", model_config.get("text_config"))):
        for key in (_OPTION, "compression_config"):
            value = part.get(key) if isinstance(part, Mapping) else None
            if value is None:
                continue
            if not isinstance(value, Mapping):
                fix = "Repair the checkpoint's config.json: an object is expected."
                raise InputError.one(f"config.json: {prefix}{key}", f"holds {value!r}", fix)
            stored[prefix + key] = named(value)
    places = list(stored)
    for other in places[1:]:
        if stored[other] != stored[places[0]]:
            reason = f"{stored[places[0]]} contradicts {other} = {stored[other]}"
            raise InputError.one(f"config.json: {places[0]}", reason, "Remove the wrong one from the checkpoint.")
    return stored[places[0]] if places else None


def merge(checkpoint: QuantizationConfig | None, user: QuantizationConfig | None) -> Merged:
    """Merges the checkpoint's and the user's configuration; returns `NoneConfig` if neither quantizes.

    On a pre-quantized checkpoint the user's loading attributes are taken, and `dequantize`. Some fields of the user ask
    for nothing:

    - one that is None;
    - one of the method's `history` at its default;
    - with `dequantize`, any at its default.

    Every other field must equal the checkpoint's, also at its default. Lists of patterns may be in any order.

    Raises:
        InputError: the checkpoint has another method or kind, or fields that differ, with both values of each; or it
            holds nothing to dequantize.
    """
    if checkpoint is None or isinstance(checkpoint, NoneConfig):
        return Merged(_for_unquantized(user), prequantized=False)
    if user is None:
        return Merged(checkpoint, prequantized=True)
    if isinstance(user, NoneConfig):
        if user.dequantize:
            return Merged(replace(checkpoint, dequantize=True), prequantized=True)
        # 'none' may mean the weights as they are stored, or unquantized ones. Neither reading is taken silently.
        reason = f"'none' asks for unquantized weights, but the checkpoint is quantized: {checkpoint.to_diff_dict()}"
        fix = "Leave quantization_config out, or ask for bfloat16 with {'dequantize': True}."
        raise InputError.one(_OPTION, reason, fix)
    converted = user.convert_from(checkpoint)
    if converted is None:
        reason = (
            f"the checkpoint is quantized with {type(checkpoint).__name__} {checkpoint.to_diff_dict()}, "
            f"you gave {type(user).__name__} {user.to_diff_dict()}"
        )
        raise InputError.one(_OPTION, reason, "Leave quantization_config out to load the checkpoint as it is.")
    return Merged(replace(converted, **_overrides(user, converted)), prequantized=True)


def _overrides(user: QuantizationConfig, stored: QuantizationConfig) -> dict[str, Any]:
    """Returns the user's loading attributes that differ from the checkpoint's; any other difference is a problem."""
    problems = Problems()
    overrides = {}
    for field in fields(user):
        name = field.name
        ours, theirs = getattr(user, name), getattr(stored, name)
        # A default counts as a request: a configuration without `bits` means 4 bits. There are two exceptions, in which
        # nobody can have meant it: fields about how the checkpoint was made, and a user who only asks for bfloat16.
        silent = ours is None or ((user.dequantize or name in user.history) and _is_silent(user, field))
        if silent or user.meaning(name) == stored.meaning(name):
            continue
        if name in user.loading_attributes or name == "dequantize":
            overrides[name] = ours
        else:
            free = ", ".join(sorted(user.loading_attributes)) or "nothing"
            fix = f"Set it to {theirs!r}, or leave quantization_config out; only {free} may differ."
            problems.add(where(name), f"the checkpoint has {theirs!r}, you gave {ours!r}", fix)
    problems.raise_if_any()
    return overrides


def lists_modules(user: QuantizationConfig | None, model_config: Mapping[str, Any], merged: Merged) -> bool:
    """Returns True if the list of modules not to convert, in a quantized checkpoint's merged config, is the user's."""
    name = merged.config.skip_field
    if user is None or name is None or getattr(user, name, None) is None:
        return False
    stored = parse(detect(model_config), [type(merged.config)], stored=True)
    return stored is not None and merged.config.meaning(name) != stored.meaning(name)


def _is_silent(user: QuantizationConfig, field: Field[Any]) -> bool:
    """Returns True if a field asks for nothing: it has its default, or follows from others."""
    return getattr(user, field.name) == default_of(field) or field.name in user.derived_fields()


def _for_unquantized(user: QuantizationConfig | None) -> QuantizationConfig:
    """Returns the user's configuration for an unquantized checkpoint, which holds nothing to dequantize."""
    if user is None or isinstance(user, NoneConfig):
        return replace(user, dequantize=False) if user else NoneConfig()
    if user.dequantize:
        reason = f"the checkpoint is not quantized: {user.quant_method!r} with dequantize=True would do nothing"
        raise InputError.one(where("dequantize"), reason, "Remove it to quantize, or give 'none'.")
    return user
