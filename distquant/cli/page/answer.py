"""The first part of the page: does it fit, what is planned, and what its reader should know."""

from __future__ import annotations

from pathlib import PurePath

from distquant.cli.page.markup import Html, tag
from distquant.cli.page.memory import Limit, answer
from distquant.config.resolve import is_known, parse
from distquant.config.vocabulary import Precision
from distquant.planning import LoadPlan
from distquant.quantization import config_classes
from distquant.units import format_bytes

WARNINGS = ("SKIPPED", "DELEGATED", "dropped", "left out")
"""First words of notes that are shown as warnings: the loaded model is not the one in the checkpoint."""


def answer_section(plan: LoadPlan, limit: Limit | None) -> Html:
    """Returns the answer to "does it fit", and model, method, mesh and weights in a line."""
    kind, verdict, numbers = answer(plan, limit)
    stored = "as the checkpoint stores it" if plan.prequantized else f"quantized from {plan.dtype}"
    ranks = "1 rank" if plan.mesh.size == 1 else f"{plan.mesh.size} ranks"
    nodes = len(set(plan.nodes))
    mark = {"yes": "\N{CHECK MARK}", "no": "\N{MULTIPLICATION X}", "unknown": "?"}[kind]
    method, precision = method_name(plan), _precision(plan)
    details = ", ".join(filter(None, (stored, *_details(precision))))
    most = format_bytes(max(row.finished for row in plan.memory))
    every = "" if plan.mesh.size == 1 else f" at most; {format_bytes(sum(row.finished for row in plan.memory))} on all"
    files = f"{len(plan.shards)} file{'s' * (len(plan.shards) != 1)}"
    facts = {
        "Model": (plan.architecture, f"{plan.model_type}, {format_bytes(plan.checkpoint_bytes)} in {files}"),
        "Method": (method, "" if method.startswith("not") else details),
        "Mesh": (str(plan.mesh), f"{ranks} on {nodes} node{'s' * (nodes != 1)}"),
        "Weights": (most, f"on {'the' if plan.mesh.size == 1 else 'each'} rank{every}"),
    }
    listed = (
        tag("div", tag("dt", name), tag("dd", tag("b", fact), tag("span", more)))
        for name, (fact, more) in facts.items()
    )
    line = tag("p", tag("span", mark, class_="mark", aria_hidden="true"), tag("b", verdict), tag("span", numbers))
    return tag("section", tag("div", line, class_=f"verdict {kind}"), tag("dl", *listed), id="answer", tabindex="-1")


def short_name(plan: LoadPlan) -> str:
    """Returns the last part of the checkpoint's path."""
    return PurePath(plan.model).name or plan.model


def method_name(plan: LoadPlan) -> str:
    """Returns the method, and the type of its codes where all modules have one."""
    method = str(plan.quantization_config.get("quant_method", "none"))
    if method == "none":
        return f"not quantized ({plan.dtype})"
    precision = _precision(plan)
    return method if precision is None or method in precision.weight else f"{method} {precision.weight}"


def _precision(plan: LoadPlan) -> Precision | None:
    """Returns the precision that all converted modules have; None if they have several, or an unknown one."""
    if not is_known(plan.quantization_config, config_classes()):
        return None
    config = parse(plan.quantization_config, config_classes())
    precisions = config.vocabulary() if config is not None else ()
    return precisions[0] if len(precisions) == 1 else None


def _details(precision: Precision | None) -> tuple[str, ...]:
    """Returns the weights that share a scale, in words, and the quantization of the scales."""
    if precision is None:
        return ()
    group = precision.group
    if isinstance(group, tuple):
        words = f"a scale for {group[0]} × {group[1]} weights"
    elif isinstance(group, int):
        words = f"a scale for {group} weights"
    else:
        words = f"a scale for each {group}" if group else ""
    return words, "double quantization" if precision.double_quant else ""


def notes_section(plan: LoadPlan) -> Html:
    """Returns warnings, then notes, then what is checked at load."""
    notes = sorted(plan.notes, key=lambda note: not note.startswith(WARNINGS))
    items = [_note("warning" if note.startswith(WARNINGS) else "note", *_first_words(note)) for note in notes]
    items += [_note("later", "checked at load", item) for item in plan.check_at_load]
    return tag("section", tag("h2", "Notes and warnings"), tag("ul", *items), id="notes") if items else Html("")


def _first_words(note: str) -> tuple[str, str]:
    """Divides a note at its colon, if that comes soon; else it has no first words."""
    first, colon, rest = note.partition(": ")
    return (first, rest) if colon and len(first) <= 60 else ("", note)


def _note(kind: str, first: str, rest: str) -> Html:
    return tag("li", tag("b", first) if first else "", " " if first else "", rest, class_=kind)
