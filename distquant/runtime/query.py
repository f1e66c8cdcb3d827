"""Queries to a loaded model, the same in every runtime: an answer to a prompt, perplexity, the fingerprint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distquant.errors import InputError
from distquant.loading.report import RankReport, make_report
from distquant.model import source_of, tokenizer_file_problems
from distquant.planning import LoadPlan
from distquant.progress import status


@dataclass(frozen=True, kw_only=True)
class Query:
    """A query to a loaded model; all ranks get the same."""

    prompt: str | None = None
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
    perplexity: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def generate(model: Any, prompt: str | list[str], **kwargs: Any) -> str | list[str]:
    """Returns prompt and continuation as text. On a sharded model all ranks must call it.

    Args:
        model: the loaded model.
        prompt: one prompt, or a list that is answered as a batch.
        kwargs: of `generate` of transformers.

    Returns:
        All answers in order where several were asked for (prompts, or `num_return_sequences`); else the only one.

    Raises:
        InputError: `return_dict_in_generate`, which asks for more than text.
    """
    if kwargs.get("return_dict_in_generate"):
        fix = "Use call(function), where the function calls model.generate and returns what it needs"
        raise InputError.one("return_dict_in_generate", "the answer of generate is text", fix)
    tokenizer = _tokenizer(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # the attention mask hides every padding
    batch = isinstance(prompt, list)
    inputs = tokenizer(prompt, return_tensors="pt", padding=batch, **({"padding_side": "left"} if batch else {}))
    if kwargs.get("stop_strings") or model.generation_config.stop_strings:
        kwargs = {"tokenizer": tokenizer, **kwargs}
    output = model.generate(**inputs.to(model.device), **kwargs)
    answers = tokenizer.batch_decode(output, skip_special_tokens=True)
    return answers if batch or len(answers) > 1 else answers[0]


def perform(model: Any, query: Query, runtime: str) -> Outcome:
    """Runs a query on a loaded model. On a sharded model all ranks must call it; all get the outcome."""
    from distquant.verification.fingerprint import fingerprint
    from distquant.verification.perplexity import perplexity

    status("computing the fingerprint")
    loaded = model.distquant
    plan: LoadPlan = loaded.plan
    digest = fingerprint(model) if query.fingerprint and not loaded.scheme.delegated else None
    ranks: list[RankReport] = loaded.comm.collect(loaded.report)
    outcome = Outcome(report=make_report(plan, runtime, ranks, digest))
    if query.prompt is not None:
        status("generating")
        answer = generate(model, query.prompt, **query.generate)
        outcome.answer = answer if isinstance(answer, str) else "\n".join(answer)
    if query.text is not None:
        status("measuring perplexity")
        outcome.perplexity = perplexity(model, _tokenizer(model), query.text, query.window)
    return outcome


def _tokenizer(model: Any) -> Any:
    from transformers import AutoTokenizer

    plan = model.distquant.plan
    if problems := list(tokenizer_file_problems(Path(plan.model))):
        raise InputError(problems)
    folder, gguf = source_of(plan.model)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=plan.trust_remote_code, **gguf)
