"""Detect, parse, merge: from what the user gave and what lies in the checkpoint to one configuration.

The checkpoint's parameters are immutable. The user overrides loading attributes only; anything else that differs is an
error that names both values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import Field, fields, replace
from typing import Any, NamedTuple

from distquant.config.base import QuantizationConfig, default_of
from distquant.config.checks import where
from distquant.config.none import NoneConfig
from distquant.config.plain import plain
from distquant.config.values import did_you_mean, is_json_source, read_json
from distquant.errors import InputError, Problems

_OPTION = "quantization_config"


ON_UNSUPPORTED = ("error", "skip")
"""What to do with a checkpoint whose method nobody knows here."""


class Merged(NamedTuple):
    """The configuration to load with, and whether the checkpoint already holds quantized weights."""

    config: QuantizationConfig
    prequantized: bool

    @property
    def dequantize(self) -> bool:
        """Whether what the checkpoint holds quantized is to be loaded as bfloat16."""
        return self.prequantized and self.config.dequantize


def resolve(
    model_config: Mapping[str, Any],
    user: QuantizationConfig | None,
    classes: Iterable[type[QuantizationConfig]],
    on_unsupported: str = "error",
) -> tuple[Merged, dict[str, Any] | None]:
    """What `detect`, `parse` and `merge` make of a checkpoint's `config.json` and of what the user gave.

    Args:
        model_config: the parsed `config.json`.
        user: the user's configuration, if there is one.
        classes: the known configuration classes.
        on_unsupported: "skip" leaves out a checkpoint's method that is not among them; anything else makes it an error.

    Returns:
        the configuration to load with, and the checkpoint's own where its method is left out.

    Raises:
        InputError: as those; and where a user's method would quantize weights whose own method is left out.
    """
    classes = tuple(classes)
    stored = detect(model_config)
    if stored is None or is_known(stored, classes):
        return merge(parse(stored, classes), user), None
    method = plain(stored["quant_method"])
    if on_unsupported != "skip":
        skip = "To plan the checkpoint's tensors as they are stored: on_unsupported='skip' (--on-unsupported skip)."
        fix = f"{_known_methods(method, classes)} {skip}"
        raise InputError.one(where("quant_method"), f"{method!r} is not supported", fix)
    if user is not None and user.dequantize:
        what = f"nothing here can dequantize what {method!r} has quantized"
        raise InputError.one(where("dequantize"), what, "Remove it, or take another checkpoint.")
    if user is not None and not isinstance(user, NoneConfig):
        what = f"{user.to_diff_dict()} cannot quantize weights that {method!r} has quantized, and {method!r} is skipped"
        raise InputError.one(_OPTION, what, "Leave quantization_config out, or take an unquantized checkpoint.")
    return Merged(NoneConfig(), prequantized=False), stored


def is_known(given: Mapping[str, Any], classes: Iterable[type[QuantizationConfig]]) -> bool:
    """Whether some class is for the method of a dict; a dict that names no method is for `parse` to judge."""
    method = plain(given.get("quant_method"))
    return method is None or any(cls.is_for(method) for cls in classes)


def parse(given: Any, classes: Iterable[type[QuantizationConfig]]) -> QuantizationConfig | None:
    """The configuration that is meant, whichever way it was given.

    Args:
        given: None, one of our configurations, a `transformers` one (anything with `to_dict`), a dict, the path of a
            JSON file (a `Path`, or a string ending in `.json`), JSON text, or a short name.
        classes: the known configuration classes; the first that matches a dict is taken.

    Raises:
        InputError: an unknown method, name, key or value, with near matches; every problem at once.
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
        given = {**given.to_dict(), **attributes}  # some of transformers' classes leave them out of their dict
    if not isinstance(given, Mapping):
        fix = "Give a configuration object, a dict, the path of a JSON file, or a short name."
        raise InputError.one(_OPTION, f"{given!r} ({type(given).__name__}) is no quantization configuration", fix)
    return _class_for(given, classes).from_dict(given)


def _from_short_name(name: str, classes: tuple[type[QuantizationConfig], ...]) -> QuantizationConfig:
    known = {short: (cls, values) for cls in classes for short, values in cls.short_names.items()}
    if name not in known:
        fix = f"{did_you_mean(name, known)} Known names: {', '.join(known)}.".strip()
        raise InputError.one(_OPTION, f"{name!r} is no known quantization", fix)
    cls, values = known[name]
    return cls(**values)


def _class_for(given: Mapping[str, Any], classes: tuple[type[QuantizationConfig], ...]) -> type[QuantizationConfig]:
    for cls in classes:
        if cls.matches(given):
            return cls
    method = plain(given.get("quant_method"))
    markers = [f"{cls.marker}=True" for cls in classes if cls.is_for(method) and cls.marker]
    if markers:
        raise InputError.one(_OPTION, f"{method!r} does not say which kind is meant", f"Add {' or '.join(markers)}.")
    what = "is missing" if method is None else f"{method!r} is not supported"
    raise InputError.one(where("quant_method"), what, _known_methods(method, classes))


def _known_methods(method: Any, classes: Iterable[type[QuantizationConfig]]) -> str:
    """What may have been meant instead."""
    known = list(dict.fromkeys(cls.quant_method for cls in classes))
    near = did_you_mean(method, known) if method is not None else ""
    return f"{near} Known methods: {', '.join(known)}.".strip()


def detect(model_config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization config in a checkpoint's `config.json`, or None where its weights are not quantized.

    It lies under `quantization_config` (older compressed-tensors: `compression_config`), at the top or in
    `text_config`.

    Raises:
        InputError: it is not an object, or two places contradict each other.
    """
    found: dict[str, dict[str, Any]] = {}
    for prefix, part in (("", model_config), ("text_config.", model_config.get("text_config"))):
        for key in (_OPTION, "compression_config"):
            value = part.get(key) if isinstance(part, Mapping) else None
            if value is None:
                continue
            if not isinstance(value, Mapping):
                fix = "Repair the checkpoint's config.json: an object is expected."
                raise InputError.one(f"config.json: {prefix}{key}", f"holds {value!r}", fix)
            found[prefix + key] = dict(value)
    places = list(found)
    for other in places[1:]:
        if found[other] != found[places[0]]:
            what = f"{found[places[0]]} contradicts {other} = {found[other]}"
            raise InputError.one(f"config.json: {places[0]}", what, "Remove the wrong one from the checkpoint.")
    return found[places[0]] if places else None


def merge(checkpoint: QuantizationConfig | None, user: QuantizationConfig | None) -> Merged:
    """One configuration from the checkpoint's and the user's; `NoneConfig` where neither quantizes.

    On a pre-quantized checkpoint the user's loading attributes are taken, `dequantize` among them. A field that is None
    on the user's side asks for nothing, and so does one of the method's `history` that has its default, or any that has
    it beside `dequantize`; every other must equal the checkpoint's (lists of patterns in any order), defaults included.

    Raises:
        InputError: another method or kind than the checkpoint's, or fields that differ; names both values of each; or
            nothing that could be dequantized.
    """
    if checkpoint is None or isinstance(checkpoint, NoneConfig):
        return Merged(_for_unquantized(user), prequantized=False)
    if user is None:
        return Merged(checkpoint, prequantized=True)
    if isinstance(user, NoneConfig):
        if user.dequantize:
            return Merged(replace(checkpoint, dequantize=True), prequantized=True)
        what = f"'none' asks for unquantized weights, but the checkpoint is quantized: {checkpoint.to_diff_dict()}"
        fix = "Leave quantization_config out, or ask for bfloat16 with {'dequantize': True}."
        raise InputError.one(_OPTION, what, fix)
    adopted = user.adopt(checkpoint)
    if adopted is None:
        what = (
            f"the checkpoint is quantized with {type(checkpoint).__name__} {checkpoint.to_diff_dict()}, "
            f"you gave {type(user).__name__} {user.to_diff_dict()}"
        )
        raise InputError.one(_OPTION, what, "Leave quantization_config out to load the checkpoint as it is.")
    problems = Problems()
    overrides = {}
    for field in fields(user):
        name = field.name
        ours, theirs = getattr(user, name), getattr(adopted, name)
        silent = ours is None or ((user.dequantize or name in user.history) and _is_silent(user, field))
        if silent or user.meaning(name) == adopted.meaning(name):
            continue
        if name in user.loading_attributes or name == "dequantize":
            overrides[name] = ours
        else:
            free = ", ".join(sorted(user.loading_attributes)) or "nothing"
            fix = f"Set it to {theirs!r}, or leave quantization_config out; only {free} may differ."
            problems.add(where(name), f"the checkpoint has {theirs!r}, you gave {ours!r}", fix)
    problems.raise_if_any()
    return Merged(replace(adopted, **overrides), prequantized=True)


def _is_silent(user: QuantizationConfig, field: Field[Any]) -> bool:
    """Whether a field asks for nothing: it has its default, or follows from others."""
    return getattr(user, field.name) == default_of(field) or field.name in user.settled()


def _for_unquantized(user: QuantizationConfig | None) -> QuantizationConfig:
    """The user's configuration for a checkpoint that is not quantized, and so has nothing to dequantize."""
    if user is None or isinstance(user, NoneConfig):
        return replace(user, dequantize=False) if user else NoneConfig()
    if user.dequantize:
        what = f"the checkpoint is not quantized, and {user.quant_method!r} with dequantize=True would quantize nothing"
        raise InputError.one(where("dequantize"), what, "Remove it to quantize, or give 'none'.")
    return user
