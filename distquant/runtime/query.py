"""Queries to a loaded model, the same in every runtime: an answer to a prompt, perplexity, the fingerprint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from distquant.loading.report import RankReport, load_notes, make_report
from distquant.planning import LoadPlan
from distquant.progress import status
from distquant.runtime.answer import answer, generate
from distquant.runtime.tokens import check_vocabulary, encoded, has_template, tokenizer_of, vocabulary_of

TEXT_TOKENS = 40
"""New tokens where a prompt is continued and nobody says how far."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """A query to a loaded model; all ranks get the same."""

    prompt: str | None = None
    """What a user says, to a model with a chat template; text to be continued, to any other."""
    raw: bool = False
    """The prompt is text to be continued, whatever the model has."""
    generate: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of `generate`."""
    text: str | None = None
    """Text to measure perplexity on."""
    window: int = 256
    fingerprint: bool = True


@dataclass(kw_only=True)
class Outcome:
    """The outcome of a query."""

    report: dict[str, Any]
    answer: str | None = None
    """Answer of a chat model; prompt and continuation of any other."""
    template: bool = False
    """True if the model's chat template was applied to the prompt."""
    end: str | None = None
    """A value of `answer.End`, for an answer of a chat model."""
    perplexity: float | None = None
    notes: list[str] = field(default_factory=list)
    """Those of the plan, and of the load."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def perform(model: Any, query: Query, runtime: str) -> Outcome:
    """Runs a query on a loaded model. On a sharded model all ranks must call it; all get the outcome."""
    from distquant.verification.fingerprint import fingerprint
    from distquant.verification.perplexity import perplexity

    status("computing the fingerprint")
    loaded = model.distquant
    plan: LoadPlan = loaded.plan
    digest = fingerprint(model) if query.fingerprint and not loaded.scheme.delegated else None
    ranks: list[RankReport] = loaded.comm.collect(loaded.report)
    notes = [*plan.notes, *load_notes(ranks)]
    outcome = Outcome(report=make_report(plan, runtime, ranks, digest), notes=notes)
    if query.prompt is not None:
        status("generating")
        _answer(model, query.prompt, query, outcome)
    if query.text is not None:
        status("measuring perplexity")
        tokenizer = tokenizer_of(model)
        check_vocabulary(encoded(tokenizer, query.text, "text").input_ids, vocabulary_of(model), "text")
        outcome.perplexity = perplexity(model, tokenizer, query.text, query.window)
    return outcome


def _answer(model: Any, prompt: str, query: Query, outcome: Outcome) -> None:
    """Puts the answer to a prompt into an outcome."""
    outcome.template = not query.raw and has_template(tokenizer_of(model))
    if outcome.template:
        found = answer(model, [{"role": "user", "content": prompt}], **query.generate)
        outcome.answer, outcome.end = found.text, found.end
    else:
        text = generate(model, prompt, **{"max_new_tokens": TEXT_TOKENS, **query.generate})
        outcome.answer = text if isinstance(text, str) else "\n".join(text)
