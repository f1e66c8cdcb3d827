"""The base of every quantization configuration: frozen fields under Hugging Face's names, read strictly.

A method declares its fields with type hints and a few class variables; reading, writing, comparing and reporting are
driven by those. One `InputError` lists every problem of a configuration.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from distquant.config import evidence
from distquant.config.checks import where
from distquant.config.frozen import FrozenDict, thaw
from distquant.config.plain import plain
from distquant.config.selection import ModuleSelection
from distquant.config.values import coerce, describe, did_you_mean, hints_of, read_json
from distquant.config.vocabulary import Precision
from distquant.errors import InputError, Problem, Problems

if TYPE_CHECKING:
    from typing_extensions import Self

EXTRAS = frozenset({"include_modules", "layers", "dequantize"})
"""Fields that every method has here. `to_dict` writes them only on request, because transformers does not know them."""

_BOOKKEEPING = frozenset({"quant_method", "transformers_version"})


def default_of(field: Field[Any]) -> Any:
    """Returns the default value of a dataclass field, or `MISSING`."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _has_type(cls: type, name: str, value: Any) -> bool:
    """Returns True if a field may hold values of this type."""
    try:
        coerce(value, hints_of(cls)[name])
    except ValueError:
        return False
    return True


def _without_nulls(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a stored configuration without the keys that are null where their field cannot be: they are not given."""
    hints = hints_of(cls)
    return {k: v for k, v in given.items() if v is not None or k not in hints or _has_type(cls, k, None)}


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationConfig:
    """The parameters of one quantization method, checked at construction.

    Raises:
        InputError: at construction; lists every problem of types, values and exclusive options.
    """

    quant_method: ClassVar[str]
    """Hugging Face's name of the method."""
    method_spellings: ClassVar[frozenset[str]] = frozenset()
    """Other names of the method in older files."""
    marker: ClassVar[str | None] = None
    """The key that, when true, chooses this class among those of one `quant_method`."""
    loading_attributes: ClassVar[frozenset[str]] = frozenset()
    """Fields that change no stored bit: the user may override them on a pre-quantized checkpoint."""
    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Groups of keys of which at most one may be true."""
    flags: ClassVar[frozenset[str]] = frozenset()
    """Of `constants`, those that tell this class from another: an error with another value in a checkpoint, too."""
    constants: ClassVar[Mapping[str, Any]] = {}
    """Keys of Hugging Face with one possible value here: always written, and an error if read with another value."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """Other spellings of keys -> the field's name; some are historical."""
    echoes: ClassVar[Mapping[str, str]] = {}
    """Aliases that transformers writes beside the field itself."""
    unwritten: ClassVar[frozenset[str]] = EXTRAS
    """Fields that transformers does not write, though it reads some; `to_dict(extras=True)` writes them if set."""
    sparse: ClassVar[frozenset[str]] = frozenset()
    """Fields of other tools, written only if set."""
    history: ClassVar[frozenset[str]] = frozenset({"recorded"})
    """Fields that describe how a checkpoint was made; at their defaults they ask nothing of one that exists."""
    record_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys of other tools and older versions that do not affect the stored weights: kept in `recorded`."""
    none_is_default: ClassVar[frozenset[str]] = frozenset()
    """Fields for which None means the default."""
    skip_field: ClassVar[str | None] = None
    """The field that lists the modules not to convert, under the method's own name."""
    short_names: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Names a user may give instead of a configuration, and the fields that each sets."""

    include_modules: tuple[str, ...] | None = None
    """Patterns of the only modules to quantize (distquant's own option, see `ModuleSelection`)."""
    layers: str | None = None
    """Ranges of the only layers to quantize, such as `"2-5,7"` (distquant's own option)."""
    dequantize: bool = False
    """Load the checkpoint's quantized weights as bfloat16."""
    recorded: Mapping[str, Any] = FrozenDict()
    """Notes of other tools, under their own keys; read and written, not used."""

    def __post_init__(self) -> None:
        problems = Problems()
        hints = hints_of(type(self))
        checkable = True
        for field in fields(self):
            given = getattr(self, field.name)
            if given is None and field.name in self.none_is_default:
                given = default_of(field)
            try:
                value = coerce(given, hints[field.name])
            except ValueError:
                problems.add(where(field.name), f"{given!r} is not allowed", f"Give {describe(hints[field.name])}.")
                value = default_of(field)  # a valid value, so that the checks of the other fields can still run
                checkable = checkable and value is not MISSING
            object.__setattr__(self, field.name, value)
        if checkable:
            for name, value in self.derived_fields().items():
                object.__setattr__(self, name, value)
            problems.extend(self.problems())
        problems.raise_if_any()

    def problems(self) -> list[Problem]:
        """Returns all problems of the values; empty for every constructed object."""
        skip_name = where(self.skip_field) if self.skip_field else "skip"
        problems = self.selection.problems(skip_name, where("include_modules"))
        return [*problems, *self._value_problems()]

    def derived_fields(self) -> Mapping[str, Any]:
        """Returns the fields that follow from others, with values of the declared types."""
        return {}

    def _value_problems(self) -> Iterable[Problem]:
        """Yields the problems of a method's own checks; all fields have the declared types here."""
        return ()

    @property
    def selection(self) -> ModuleSelection:
        """The modules that this configuration converts, as far as it names them."""
        skip = getattr(self, self.skip_field) if self.skip_field else None
        return ModuleSelection(skip=skip, include=self.include_modules, layers=self.layers)

    def meaning(self, name: str) -> Any:
        """Returns the value by which two configurations are compared in a field: lists of patterns are unordered."""
        value = getattr(self, name)
        unordered = name in (self.skip_field, "include_modules") and value is not None
        return frozenset(value) if unordered else value

    @classmethod
    def convert_from(cls, checkpoint: QuantizationConfig) -> Self | None:
        """Converts a checkpoint's configuration into this class; returns None if this class cannot load it."""
        return checkpoint if type(checkpoint) is cls else None

    def vocabulary(self) -> tuple[Precision, ...]:
        """Returns the precisions of the weights in terms that all methods share; empty if nothing is quantized."""
        return ()

    def with_group_size(self, size: int) -> str | None:
        """Returns the short name of this configuration with another group size; None if there is none."""
        own = next((name for name in self.short_names if type(self)(**self.short_names[name]) == self), None)
        return f"{own}-g{size}" if f"{own}-g{size}" in self.short_names else None

    @classmethod
    def matches(cls, given: Mapping[str, Any]) -> bool:
        """Returns True if a dict is meant for this class; without a `quant_method` the marker alone decides."""
        method = plain(given.get("quant_method"))
        marked = cls.marker is not None and any(
            given.get(key) for key in (cls.marker, *(old for old, new in cls.aliases.items() if new == cls.marker))
        )
        return marked if method is None else cls.is_for(method) and (marked or cls.marker is None)

    @classmethod
    def is_for(cls, method: Any) -> bool:
        """Returns True if a `quant_method` names this class's method."""
        word = plain(method)
        return isinstance(word, str) and (word == cls.quant_method or word in cls.method_spellings)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], *, stored: bool = False) -> Self:
        """Reads Hugging Face's spelling strictly: one error lists every unknown key and wrong value.

        Args:
            given: the configuration.
            stored: True for a checkpoint's own. Words of other tools are read then, too, and keys that are unknown
                are kept in `recorded`, unless they change what the stored bytes mean.
        """
        problems = Problems()
        unknown: dict[str, Any] = {}
        if stored:
            given = cls._stored(evidence.named(given), unknown)
        given = cls._rename(cls._spelled(given), problems, evidence.KEYS.get(cls.quant_method, {}) if stored else {})
        if stored:
            given = cls._nested(_without_nulls(cls, evidence.usual_values(given, cls.quant_method)), unknown)
        clashing = cls._check_exclusive(given, problems)
        declared = {field.name: field for field in fields(cls)}
        method = plain(given.get("quant_method"))
        if method is not None and not cls.is_for(method):
            problems.add(where("quant_method"), f"{method!r} is not {cls.quant_method!r}", f"{cls.__name__} is for it.")
        for key, value in given.items():
            if key in cls.constants:
                if key not in clashing and plain(value) not in (None, cls.constants[key]):
                    if stored and key not in cls.flags:
                        unknown[key] = value
                        continue
                    reason = f"invalid value {plain(value)!r}, {cls.__name__} takes only {cls.constants[key]!r}"
                    problems.add(where(key), reason, "Remove it.")
            elif key not in declared and key not in _BOOKKEEPING:
                if stored:
                    unknown.update({} if key in cls.record_keys else {str(key): value})
                elif key not in cls.record_keys:
                    problems.extend([cls._unknown_key(key, value)])
                    continue
                problems.extend(filter(None, [evidence.changed_meaning(str(key), value)]))
        problems.extend(filter(None, (evidence.changed_meaning(key, value) for key, value in unknown.items())))
        missing = [name for name, field in declared.items() if default_of(field) is MISSING and name not in given]
        for name in missing:
            problems.add(where(name), "is missing", f"Give {describe(hints_of(cls)[name])}.")
        if not missing:
            values = {key: value for key, value in given.items() if key in declared}
            recorded = {key: value for key, value in given.items() if key in cls.record_keys} | unknown
            try:
                config = cls._built(values, recorded, stored)
            except InputError as error:
                problems.extend(error.problems)
        problems.raise_if_any()
        return config

    @classmethod
    def _unknown_key(cls, key: Any, value: Any) -> Problem:
        """Returns the problem of a key that this class does not know, with near matches."""
        declared = [field.name for field in fields(cls)]
        names = ", ".join(name for name in declared if name != "recorded")
        fix = did_you_mean(key, [*declared, *cls.constants, *cls.aliases, *cls.record_keys])
        return Problem(where(str(key)), f"is unknown (given {value!r})", fix or f"{cls.__name__} knows {names}.")

    @classmethod
    def _built(cls, values: Mapping[str, Any], recorded: Mapping[str, Any], stored: bool) -> Self:
        """Returns the object of these fields; what a stored one says of its history need not be possible here."""
        try:
            return cls(**{**values, "recorded": {**values.get("recorded", {}), **recorded}})
        except InputError as error:
            odd = {key for key in cls.history if where(key) in {problem.where for problem in error.problems}}
            odd = {key for key in odd & values.keys() if _has_type(cls, key, values[key])}
            if not stored or not odd:
                raise
            kept = {key: value for key, value in values.items() if key not in odd}
            return cls._built(kept, {**recorded, **{key: values[key] for key in odd}}, stored)

    @classmethod
    def _stored(cls, given: Mapping[str, Any], unknown: dict[str, Any]) -> Mapping[str, Any]:
        """Converts forms that only files have; may move keys to `unknown`."""
        return given

    @classmethod
    def _nested(cls, given: Mapping[str, Any], unknown: dict[str, Any]) -> Mapping[str, Any]:
        """Moves unknown keys of objects inside of a stored configuration to `unknown`, under dotted paths."""
        return given

    @property
    def unused_keys(self) -> tuple[str, ...]:
        """Keys of a checkpoint's configuration that have no effect and no place here, in the order of the alphabet."""
        declared = {field.name for field in fields(self)}
        return tuple(sorted(key for key in self.recorded if key not in self.record_keys and key not in declared))

    @classmethod
    def _spelled(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Converts historical spellings, beyond aliases of keys, into today's form."""
        return given

    @classmethod
    def _rename(
        cls, given: Mapping[str, Any], problems: Problems, more: Mapping[str, str] = FrozenDict()
    ) -> dict[str, Any]:
        """Renames aliases of keys; `more` are those of files."""
        aliases = {**more, **cls.aliases}
        renamed = {key: value for key, value in given.items() if key not in aliases}
        for old, new in aliases.items():
            if old not in given:
                continue
            other = renamed.setdefault(new, given[old])
            if other is not given[old] and other != given[old]:  # `is`, because NaN is not equal to itself
                reason = f"{given[old]!r} contradicts {new}={other!r}"
                problems.add(where(old), reason, f"They mean the same: give {new} only.")
        return renamed

    @classmethod
    def _check_exclusive(cls, given: Mapping[str, Any], problems: Problems) -> set[str]:
        clashing: set[str] = set()
        for group in cls.exclusive:
            chosen = [key for key in group if given.get(key)]
            if len(chosen) > 1:
                problems.add(where(chosen[0]), f"{' and '.join(chosen)} exclude each other", "Set only one of them.")
                clashing.update(chosen)
        return clashing

    def to_dict(self, *, extras: bool = False) -> dict[str, Any]:
        """Returns Hugging Face's spelling, ready for JSON; `extras` adds set fields that transformers does not have."""
        recorded = {key: thaw(value) for key, value in self.recorded.items() if "." not in key}
        written: dict[str, Any] = {"quant_method": self.quant_method, **self.constants, **recorded}
        for field in fields(self):
            value, rare = getattr(self, field.name), field.name in self.unwritten
            always = not rare and field.name not in self.sparse
            if field.name != "recorded" and (always or ((extras or not rare) and value != default_of(field))):
                written[field.name] = thaw(value)
        for key, value in self.recorded.items():
            if key in written:  # a field's own default is there
                written[key] = thaw(value)
            elif "." in key:
                evidence.put_back(written, key, thaw(value))
        return {**written, **{old: written[new] for old, new in self.echoes.items()}}

    def to_diff_dict(self, *, extras: bool = False) -> dict[str, Any]:
        """Returns `to_dict` reduced to the keys that differ from their defaults and those that name the class."""
        identity = {"quant_method", self.marker}
        changed = {field.name for field in fields(self) if getattr(self, field.name) != default_of(field)}
        return {key: value for key, value in self.to_dict(extras=extras).items() if key in identity | changed}

    def to_json(self) -> str:
        """Returns all fields, distquant's own options included, as JSON text that `from_json` reads back."""
        return json.dumps(self.to_dict(extras=True), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, source: str | Path) -> Self:
        """Reads JSON text or a JSON file."""
        return cls.from_dict(read_json(source))
