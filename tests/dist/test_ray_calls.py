"""A model on Ray workers, used by several threads, after failures, and after its end."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

import distquant as dq
from distquant import InputError, RankError
from distquant.errors import LostPeerError
from distquant.runtime.ray_model import gather

PROMPTS = ["In the beginning", "And the LORD said unto Moses", "Blessed are", "And God said"]
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def sharded(kjv_tiny: str) -> Iterator[Any]:
    with dq.ray.load(kjv_tiny, quantization_config="nf4", mesh="tp=2", timeout=60) as model:
        yield model


@pytest.fixture(scope="module")
def alone(sharded: Any) -> dict[str, str]:
    """Each prompt's answer while nothing else is asked."""
    return {prompt: sharded.generate(prompt, **GREEDY) for prompt in PROMPTS}


def in_threads(function: Any, values: list[Any]) -> list[Any]:
    """What the function returns or raises for every value, all at once."""
    found: list[Any] = [None] * len(values)

    def work(index: int) -> None:
        try:
            found[index] = function(values[index])
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(values))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_lost_and_closed_models_say_so(kjv_tiny):
    """Where one rank fails, the other waits until its timeout, and its process group is of no use after that."""

    def fail(model: Any) -> Any:
        if model.distquant.comm.rank == 1:
            raise ValueError("no memory for this batch")
        return model.distquant.comm.collect(1)

    with dq.ray.load(kjv_tiny, quantization_config="nf4", mesh="tp=2", timeout=6) as sharded:
        with pytest.raises(RankError, match="rank 1 failed: ValueError: no memory"):
            sharded.call(fail)
        for _ in range(3):
            with pytest.raises(RankError, match=r"rank 0 failed: the model is lost: .* no memory .* load it again"):
                sharded.generate("In", max_new_tokens=2)
            time.sleep(3)  # past the timeout
    for use in (lambda: sharded.generate("In"), sharded.fingerprint, lambda: sharded.call(print)):
        with pytest.raises(InputError, match="ray: the model was closed. Load it again"):
            use()
    sharded.close()
    assert not ray.is_initialized(), "the Ray that the load started"


def test_a_rank_that_ends_is_named_and_not_the_one_that_waits_for_it(kjv_tiny):
    def leave(model: Any) -> Any:
        if model.distquant.comm.rank == 1:
            os._exit(3)
        return model.distquant.comm.collect(1)

    with dq.ray.load(kjv_tiny, quantization_config="nf4", mesh="tp=2", timeout=60) as lost:
        with pytest.raises(RankError) as caught:
            lost.call(leave)
        assert caught.value.rank == 1
        assert not isinstance(caught.value, LostPeerError)
        with pytest.raises(LostPeerError, match="rank 0 failed: RuntimeError"):
            gather(lost._unfinished[:1])
        with pytest.raises(RankError, match="the model is lost"):
            lost.report()


def test_a_text_like_that_of_a_lost_peer_is_no_lost_peer(sharded):
    """Peers that are gone are known by the type and the place of an error, not by what it says."""

    def fail(model: Any) -> None:
        if model.distquant.comm.rank == 0:
            raise RuntimeError("/gloo/transport/: Connection closed by peer (Broken pipe)")

    with pytest.raises(RankError, match="rank 0 failed: RuntimeError: .*Broken pipe") as caught:
        sharded.call(fail)
    assert not isinstance(caught.value, LostPeerError)
    assert sharded.call(lambda model: model.distquant.comm.rank) == [0, 1], "the model is not lost"


def test_threads_get_what_each_gets_alone(sharded, alone):
    """Prompts of several lengths and of the same one, where a mixture would have the right shapes."""
    asked = PROMPTS * 4
    assert in_threads(lambda prompt: sharded.generate(prompt, **GREEDY), asked) == [alone[p] for p in asked]


def test_calls_of_threads_reach_all_ranks_in_one_order(sharded):
    def note(model: Any, name: int) -> int:
        time.sleep(0.01 * model.distquant.comm.rank)
        model.order = [*getattr(model, "order", []), name]
        return name

    assert in_threads(lambda name: sharded.call(note, name), list(range(12))) == [[name] * 2 for name in range(12)]
    first, second = sharded.call(lambda model: model.order)
    assert sorted(first) == list(range(12))
    assert first == second


def test_batches_are_answered_whole(sharded, alone):
    answers = sharded.generate(PROMPTS, **GREEDY)
    assert answers == [alone[prompt] for prompt in PROMPTS]
    assert sharded.generate(PROMPTS[:1], **GREEDY) == [alone[PROMPTS[0]]]
    several = sharded.generate("Blessed are", max_new_tokens=8, do_sample=True, num_return_sequences=3)
    assert len(several) == 3
    assert all(answer.startswith("Blessed are") for answer in several)
    with pytest.raises(InputError, match=r"return_dict_in_generate: the answer of generate is text\. Use call"):
        sharded.generate("Blessed are", return_dict_in_generate=True, max_new_tokens=2)


def test_strings_and_clocks_stop_all_ranks(sharded, alone):
    text = alone[PROMPTS[0]]
    word = text[len(PROMPTS[0]) :].split()[1]
    stopped = sharded.generate(PROMPTS[0], **{**GREEDY, "min_new_tokens": 0}, stop_strings=[word])
    assert stopped == text[: text.index(word, len(PROMPTS[0])) + len(word)]
    assert text.startswith(sharded.generate(PROMPTS[0], **GREEDY, max_time=1e-6))


def test_a_model_is_not_sent_to_another_process(sharded):
    with pytest.raises(InputError, match="its calls must reach all workers in one order. Let a Ray actor load it"):
        pickle.dumps(sharded)
