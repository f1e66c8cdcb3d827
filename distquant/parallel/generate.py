"""`generate` on a sharded model: the ranks that work on the same tokens take every decision together.

Each step of `generate` runs collectives, so a rank that stops one step before another leaves it waiting for ever. Ranks
see the same logits, but not the same clock (`max_time`), and callers may give them criteria, processors and streamers
of their own. So:

- before the first step, ranks compare their arguments, and take over rank 0's random state;
- where a caller's own processors may have changed scores, all ranks use those of rank 0;
- after each step, a sequence is done when it is done on any rank. The same reduction compares the chosen tokens.

Three methods of `GenerationMixin` take these decisions: there `generate` combines its arguments and its configuration.
They are replaced on the model (and on an assistant) during a call.
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

from distquant.accelerator.facts import random_state, set_random_state
from distquant.errors import CheckFailed, InputError
from distquant.parallel.comm import Axis

OF_THE_RANK = frozenset({"self", "max_time", "streamer", "stopping_criteria", "logits_processor"})
"""Arguments of `generate` in which ranks may differ: ranks agree on their results at every step."""


class Generate:
    """`generate` of a model, for all ranks of an axis; becomes a method of the model."""

    def __init__(self, axis: Axis, batches: Axis | None = None):
        """Makes `generate` for the ranks of an axis.

        Args:
            axis: the ranks that get the same tokens.
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
            for each in (model, given.get("assistant_model")):
                if each is not None:
                    stack.enter_context(agreement.installed(each))
            output = type(model).generate(model, *args, **kwargs)
        agreement.check_tokens()
        return output

    def _take_random_state(self, model: Any) -> None:
        """Takes over rank 0's random state, so that all ranks sample the same tokens."""
        torch.set_rng_state(self.axis.broadcast(torch.get_rng_state()))
        if model.device.type != "cpu":
            on_device = random_state(model.device)
            set_random_state(self.axis.broadcast(on_device.to(model.device)).cpu(), model.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Generate:
        return self


class Agreement:
    """Decisions of the ranks in one call of `generate`."""

    def __init__(self, axis: Axis, batches: Axis | None):
        self.axis, self.batches = axis, batches
        self.own_scores = False
        """True if some rank has processors of the caller's, so that scores may differ."""
        self._differ: Tensor | None = None
        """True if ranks have chosen different tokens; stays on the device, because reading it would wait."""

    def compare(self, model: Any, given: dict[str, Any]) -> None:
        """Compares the arguments of all ranks, and records if any has processors of the caller's.

        Raises:
            InputError: prompts or options differ; on all ranks.
        """
        own = any(given.get(name) is not None for name in ("logits_processor", "prefix_allowed_tokens_fn"))
        digest = digest_of(model, given)
        # One reduction: the maximum of the negated values is the negated minimum, and equal only if all values are.
        values = torch.tensor([digest, -digest, int(own)], device=model.device)
        highest, lowest, any_own = self.axis.all_reduce(values, "max").tolist()
        self.own_scores = bool(any_own)
        if highest != -lowest:
            problem = "ranks that hold parts of one model were given different prompts or options"
            fix = "Give them the same (the ranks of another dp replica may get others)"
            raise InputError.one("generate", problem, fix)

    @contextmanager
    def installed(self, model: Any) -> Iterator[None]:
        """Replaces the methods of a model that decide in `generate` by ones that ranks decide in together."""
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
        """Returns rank 0's scores, `[rows, vocabulary]`; the last of the processors."""
        return self.axis.broadcast(scores.contiguous())

    def done(self, input_ids: Tensor, done: Tensor) -> Tensor:
        """Returns the rows that are done on any rank; also compares the last tokens and the lengths.

        Args:
            input_ids: `[rows, length]`, the token chosen last included.
            done: `[rows]`, booleans, by this rank's criteria.
        """
        last = torch.cat([input_ids[:, -1], input_ids.new_full((1,), input_ids.shape[1])])
        # Compare along with the decision that needs a reduction anyway: a second one at every step would cost as much.
        reduced = self.axis.all_reduce(torch.cat([last, -last, done.to(last.dtype)]), "max")
        highest, lowest, agreed = reduced.split([last.numel(), last.numel(), done.numel()])
        differ = (highest != -lowest).any()
        self._differ = differ if self._differ is None else self._differ | differ
        return agreed.to(torch.bool)

    def check_tokens(self) -> None:
        """Raises `CheckFailed`, on all ranks, if they have chosen different tokens: their output is meaningless."""
        if self._differ is not None and bool(self._differ):
            raise CheckFailed(
                "generate: ranks that hold parts of one model chose different tokens. Do not draw random numbers or "
                "change logits on one rank alone (in hooks, criteria or streamers)"
            )


def criteria_type() -> Any:
    """Returns the list type of criteria that ranks evaluate together; imports transformers only when called."""
    from transformers import StoppingCriteriaList

    class AgreedCriteria(StoppingCriteriaList):
        def __init__(self, criteria: Any, agreement: Agreement):
            super().__init__(criteria)
            self.agreement = agreement

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return self.agreement.done(input_ids, super().__call__(input_ids, scores, **kwargs))

    return AgreedCriteria


def digest_of(model: Any, given: dict[str, Any]) -> int:
    """Returns a 63-bit digest of the arguments that decide the tokens: plain values, and tensors of integers."""
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
                return  # an object: ranks agree on its results at every step

    configs = [config.to_dict() for config in (model.generation_config, given.get("generation_config")) if config]
    for values in (*configs, given):
        for name, value in sorted(values.items()):
            if name not in OF_THE_RANK:
                add(name, value)
    return int.from_bytes(digest.digest()[:8], "big") >> 1
