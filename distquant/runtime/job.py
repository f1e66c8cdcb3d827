"""What to do with a loaded model, the same in every runtime: answer a prompt, measure perplexity, prove its bits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distquant.errors import InputError
from distquant.planning import LoadPlan
from distquant.report import RankReport, make_report
from distquant.skeleton import source_of, tokenizer_file_problems


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is wanted of a loaded model; all ranks get the same."""

    prompt: str | None = None
    generate: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of `generate`."""
    text: str | None = None
    """Text to measure perplexity on."""
    window: int = 256
    fingerprint: bool = True


@dataclass(kw_only=True)
class Outcome:
    """What came of a job."""

    report: dict[str, Any]
    answer: str | None = None
    perplexity: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def generate(model: Any, prompt: str, **kwargs: Any) -> str:
    """Prompt and continuation as text. On a sharded model all ranks must call it."""
    tokenizer = _tokenizer(model)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, **kwargs)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def perform(model: Any, job: Job, runtime: str) -> Outcome:
    """Does a job on a loaded model. On a sharded model all ranks must call it; all get the outcome."""
    from distquant.assemble.fingerprint import fingerprint
    from distquant.quality import perplexity

    loaded = model.distquant
    plan: LoadPlan = loaded.plan
    digest = fingerprint(model) if job.fingerprint and not loaded.scheme.delegated else None
    ranks: list[RankReport] = loaded.comm.collect(loaded.report)
    outcome = Outcome(report=make_report(plan, runtime, ranks, digest))
    if job.prompt is not None:
        outcome.answer = generate(model, job.prompt, **job.generate)
    if job.text is not None:
        outcome.perplexity = perplexity(model, _tokenizer(model), job.text, job.window)
    return outcome


def _tokenizer(model: Any) -> Any:
    from transformers import AutoTokenizer

    plan = model.distquant.plan
    if problems := list(tokenizer_file_problems(Path(plan.model))):
        raise InputError(problems)
    folder, gguf = source_of(plan.model)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=plan.trust_remote_code, **gguf)
