"""`generate` on a sharded model: the ranks that work on the same tokens take every decision together.

Each step of `generate` runs collectives, so a rank that stops one step before another leaves it waiting for ever. Ranks
see the same logits, but not the same clock (`max_time`), and callers may give them criteria, processors and streamers
of their own. So:

- before the first step, ranks compare what they were given, and take over rank 0's random state;
- scores that a caller's own processors have changed are those of rank 0, on all ranks;
- after each step, a sequence is done when any rank says so. The same reduction compares the tokens that were chosen.

What decides is in three methods of `GenerationMixin`, which are replaced on the model (and on an assistant) for the
time of a call: they are where `generate` puts together what its arguments and its configuration ask for.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from distquant.errors import CheckFailed, InputError
from distquant.parallel.comm import Axis

OF_THE_RANK = frozenset({"self", "max_time", "streamer", "stopping_criteria", "logits_processor"})
"""Arguments of `generate` in which ranks may differ: what comes of them is agreed at every step."""


class Generate:
    """`generate` of a model, for all ranks of an axis; becomes a method of the model."""

    def __init__(self, axis: Axis, batches: Axis | None = None):
        """
        Args:
            axis: the ranks that are given the same tokens.
            batches: ranks that work together on batches of their own; the first that is done waits for the last.
        """
        self.axis, self.batches = axis, batches

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(type(model).generate).bind(model, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        agreement = Agreement(self.axis, self.batches)
        if self.axis.size > 1:
            agreement.compare(model, given)
            self._take_random_state(model)
        if self.batches is not None:
            kwargs.setdefault("synced_gpus", True)
        with ExitStack() as stack:
            for taking_part in (model, given.get("assistant_model")):
                if taking_part is not None:
                    stack.enter_context(agreement.installed(taking_part))
            output = type(model).generate(model, *args, **kwargs)
        agreement.check_tokens()
        return output

    def _take_random_state(self, model: Any) -> None:
        """Takes over rank 0's random state, so that all ranks sample the same tokens."""
        torch.set_rng_state(self.axis.broadcast(torch.get_rng_state()))
        if model.device.type == "cuda":
            on_device = torch.cuda.get_rng_state(model.device)
            torch.cuda.set_rng_state(self.axis.broadcast(on_device.to(model.device)).cpu(), model.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Generate:
        return self


class Agreement:
    """Decisions of the ranks in one call of `generate`."""

    def __init__(self, axis: Axis, batches: Axis | None):
        self.axis, self.batches = axis, batches
        self.own_scores = False
        """Whether some rank has processors of the caller's, so that scores may differ."""
        self._apart: Tensor | None = None
        """Whether ranks have chosen different tokens; stays on the device, because reading it there would wait."""

    def compare(self, model: Any, given: dict[str, Any]) -> None:
        """Compares the arguments of all ranks, and finds out whether any has processors of the caller's.

        Raises:
            InputError: prompts or options differ; on all ranks.
        """
        own = any(given.get(name) is not None for name in ("logits_processor", "prefix_allowed_tokens_fn"))
        digest = digest_of(model, given)
        seen = self.axis.all_reduce(torch.tensor([digest, -digest, int(own)], device=model.device), "max").tolist()
        self.own_scores = bool(seen[2])
        if seen[0] != -seen[1]:
            what = "ranks that hold parts of one model were given different prompts or options"
            fix = "Give them the same (the ranks of another dp replica may get others)"
            raise InputError.one("generate", what, fix)

    @contextmanager
    def installed(self, model: Any) -> Iterator[None]:
        """Lets the ranks decide together what this model's `generate` decides."""
        kind = type(model)

        def criteria(*args: Any, **kwargs: Any) -> Any:
            return criteria_type()(kind._get_stopping_criteria(model, *args, **kwargs), self)

        def processors(*args: Any, **kwargs: Any) -> Any:
            made = kind._get_logits_processor(model, *args, **kwargs)
            if self.own_scores:
                made.append(self.scores)
            return made

        def unfinished(this_peer_finished: bool, synced_gpus: bool, device: torch.device) -> bool:
            assert self.batches is not None
            flag = torch.tensor(0 if this_peer_finished else 1, device=device)
            return bool(self.batches.all_reduce(flag, "max"))

        replaced = (
            {"_get_stopping_criteria": criteria, "_get_logits_processor": processors} if self.axis.size > 1 else {}
        )
        if self.batches is not None:
            replaced["_has_unfinished_sequences"] = unfinished
        before = {name: vars(model)[name] for name in replaced if name in vars(model)}
        vars(model).update(replaced)
        try:
            yield
        finally:
            for name in replaced:
                del vars(model)[name]
            vars(model).update(before)

    def scores(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Rank 0's scores, `[rows, vocabulary]`; the last of the processors."""
        return self.axis.broadcast(scores.contiguous())

    def done(self, input_ids: Tensor, done: Tensor) -> Tensor:
        """Rows that are done on any rank; also compares the last tokens and the lengths.

        Args:
            input_ids: `[rows, length]`, the token chosen last included.
            done: `[rows]`, booleans: what this rank's criteria say.
        """
        last = torch.cat([input_ids[:, -1], input_ids.new_full((1,), input_ids.shape[1])])
        seen = self.axis.all_reduce(torch.cat([last, -last, done.to(last.dtype)]), "max")
        high, low, agreed = seen.split([last.numel(), last.numel(), done.numel()])
        apart = (high != -low).any()
        self._apart = apart if self._apart is None else self._apart | apart
        return agreed.to(torch.bool)

    def check_tokens(self) -> None:
        """Raises `CheckFailed`, on all ranks, if they have chosen different tokens: what they computed is no answer."""
        if self._apart is not None and bool(self._apart):
            raise CheckFailed(
                "generate: ranks that hold parts of one model chose different tokens. Do not draw random numbers or "
                "change logits on one rank alone (in hooks, criteria or streamers)"
            )


def criteria_type() -> Any:
    """The list of stopping criteria that ranks evaluate together (a function: transformers is imported when needed)."""
    from transformers import StoppingCriteriaList

    class AgreedCriteria(StoppingCriteriaList):
        def __init__(self, criteria: Any, agreement: Agreement):
            super().__init__(criteria)
            self.agreement = agreement

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return self.agreement.done(input_ids, super().__call__(input_ids, scores, **kwargs))

    return AgreedCriteria


def digest_of(model: Any, given: dict[str, Any]) -> int:
    """63 bits of what decides which tokens are computed, and how many: plain values, and tensors of integers."""
    digest = hashlib.sha256()

    def add(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            if not value.is_floating_point():
                digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        elif value is not None:
            try:
                digest.update(f"{name} {json.dumps(value, sort_keys=True)}".encode())
            except TypeError:
                return  # an object: whatever it does is agreed at every step

    configs = [config.to_dict() for config in (model.generation_config, given.get("generation_config")) if config]
    for values in (*configs, given):
        for name, value in sorted(values.items()):
            if name not in OF_THE_RANK:
                add(name, value)
    return int.from_bytes(digest.digest()[:8], "big") >> 1
