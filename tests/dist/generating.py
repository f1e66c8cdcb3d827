"""What ranks do in the tests of `generate`: each of them is given something of its own."""

from __future__ import annotations

import time
from typing import Any

import torch
import work
from torch import Tensor

import distquant as dq
from distquant.planning.request import Request
from distquant.runtime import local

IDS = torch.tensor(work.IDS)


def own_deadline(path: str, mesh: str, times: list[float], kwargs: dict[str, Any]) -> int:
    """Tokens that are chosen until the time of one rank is over."""
    model = dq.load(path, quantization_config="nf4", mesh=mesh)
    found = model.generate(IDS, max_new_tokens=20, min_new_tokens=20, max_time=times[work.rank()], **kwargs)
    return found.shape[1] - IDS.shape[1]


def own_criterion(path: str, mesh: str, ranks: list[int], kwargs: dict[str, Any]) -> list[list[int]]:
    """Tokens where these ranks alone have a criterion, which stops the second sequence after three tokens."""
    from transformers import StoppingCriteriaList

    model = dq.load(path, quantization_config="nf4", mesh=mesh)

    def third(input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        late = torch.full((len(input_ids),), input_ids.shape[1] >= IDS.shape[1] + 3)
        return late & (torch.arange(len(input_ids)) >= len(input_ids) // 2)

    more = {"stopping_criteria": StoppingCriteriaList([third])} if work.rank() in ranks else {}
    return model.generate(IDS, max_new_tokens=8, eos_token_id=119, pad_token_id=0, **kwargs, **more).tolist()


def own_processor(path: str, mesh: str, kwargs: dict[str, Any]) -> list[list[int]]:
    """Tokens where each rank's processor adds noise of its own."""
    from transformers import LogitsProcessorList

    model = dq.load(path, quantization_config="nf4", mesh=mesh)
    source = torch.Generator().manual_seed(work.rank())

    def noise(input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + 10 * torch.randn(scores.shape, generator=source)

    return model.generate(IDS, max_new_tokens=6, logits_processor=LogitsProcessorList([noise]), **kwargs).tolist()


class Heard:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass


def streamer_of_rank_0(path: str, mesh: str) -> tuple[list[int], list[int]]:
    model = dq.load(path, quantization_config="nf4", mesh=mesh)
    heard = Heard()
    more = {"streamer": heard} if work.rank() == 0 else {}
    return model.generate(IDS[:1], max_new_tokens=6, do_sample=False, **more)[0].tolist(), heard.tokens


def assisted(path: str, mesh: str | None, kwargs: dict[str, Any], slow: int = -1) -> list[list[int]]:
    """Tokens with an assistant: every rank has the whole of it. A slow rank's draft takes longer than `max_time`."""
    from transformers import AutoModelForCausalLM

    model = dq.load(path, quantization_config="none", mesh=mesh, dtype="float32")
    assistant = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if work.rank() == slow:
        assistant.register_forward_hook(lambda *_: time.sleep(0.05))
    return model.generate(IDS[:1], assistant_model=assistant, **kwargs).tolist()


def own_arguments(path: str, mesh: str, kwargs: list[dict[str, Any]]) -> tuple[str, list[list[int]]]:
    """What a rank is told where each is given arguments of its own, and what it answers afterwards."""
    model = dq.load(path, quantization_config="nf4", mesh=mesh)
    own = {key: torch.tensor(value) if key == "inputs" else value for key, value in kwargs[work.rank()].items()}
    try:
        model.generate(**{"inputs": IDS, "max_new_tokens": 4, "do_sample": False, **own})
        told = ""
    except dq.InputError as error:
        told = str(error)
    return told, model.generate(IDS, max_new_tokens=4, do_sample=False).tolist()


def drawing_alone(path: str, mesh: str) -> str:
    """What is told where rank 1 alone draws a random number."""
    from transformers import StoppingCriteriaList

    model = dq.load(path, quantization_config="nf4", mesh=mesh)

    def draw(input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        torch.rand(work.rank())
        return torch.zeros(len(input_ids), dtype=torch.bool)

    try:
        criteria = StoppingCriteriaList([draw])
        model.generate(IDS, max_new_tokens=8, do_sample=True, temperature=5.0, top_k=0, stopping_criteria=criteria)
    except dq.CheckFailed as error:
        return str(error)
    return ""


def own_batches(path: str, mesh: str, lengths: list[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of a rank's own batch and number of tokens, and what one process answers to it."""
    ep = work.rank()
    ids, more = IDS[ep : ep + 1, ep:], {"max_new_tokens": lengths[ep], "min_new_tokens": lengths[ep]}
    sharded = dq.load(path, quantization_config="nf4", mesh=mesh, dispatch="all_to_all", dtype="float32")
    found = sharded.generate(ids, do_sample=False, **more).tolist()
    whole = local.load(Request(model=path, quantization_config="nf4", dtype="float32"))
    return found, whole.generate(ids, do_sample=False, **more).tolist()


def continuous(path: str, mesh: str) -> list[str]:
    """What is told to who asks for continuous batching."""
    model = dq.load(path, quantization_config="nf4", mesh=mesh)
    told = []
    for call in (
        lambda: model.generate_batch([[5, 17]], max_new_tokens=2),
        lambda: model.generate(IDS, cache_implementation="paged", max_new_tokens=2),
    ):
        try:
            call()
        except dq.InputError as error:
            told.append(str(error))
    return told
