"""A model on Ray workers that is served: from coroutines, an actor, Ray Serve and Flask; and the end of its owner."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

import distquant as dq
from distquant import InputError

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

PROMPTS = ["In the beginning", "And the LORD said unto Moses", "Blessed are", "And God said"]
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


def needs(module: str) -> Any:
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    ray.init(num_cpus=6, **quiet)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def sharded(cluster: None, kjv_tiny: str) -> Iterator[Any]:
    with dq.ray.load(kjv_tiny, quantization_config="nf4", mesh="tp=2", timeout=60) as model:
        yield model


@pytest.fixture(scope="module")
def alone(sharded: Any) -> dict[str, str]:
    return {prompt: sharded.generate(prompt, **GREEDY) for prompt in PROMPTS}


class Server:
    """A model behind an actor or a replica, with requests as coroutines."""

    def __init__(self, path: str):
        self.model = dq.ray.load(path, quantization_config="nf4", mesh="tp=2", timeout=60)

    async def __call__(self, prompt: str) -> str:
        return await self.model.agenerate(prompt, **GREEDY)


def until(reached: Any) -> None:
    """Waits for an event that nothing announces."""
    for _ in range(600):
        if reached():
            return
        time.sleep(0.2)
    raise AssertionError("it has not come")


def free_cpus() -> float:
    return ray.available_resources().get("CPU", 0)


def test_coroutines_get_what_each_gets_alone(sharded, alone):
    """More of them than the event loop has threads, some by `to_thread`, and their loop goes on meanwhile."""

    async def ask() -> list[str]:
        loop_goes_on = asyncio.create_task(asyncio.sleep(0))
        asked = [sharded.agenerate(prompt, **GREEDY) for prompt in PROMPTS * 10]
        asked += [asyncio.to_thread(sharded.generate, prompt, **GREEDY) for prompt in PROMPTS]
        answers = asyncio.gather(*asked)
        await loop_goes_on
        assert not answers.done()
        return await answers

    assert asyncio.run(ask()) == [alone[prompt] for prompt in PROMPTS * 11]


def test_coroutines_are_answered_in_their_order(sharded):
    async def ask() -> list[int]:
        done: list[int] = []

        async def one(number: int) -> None:
            await sharded.agenerate(PROMPTS[number % 4], max_new_tokens=2, do_sample=False)
            done.append(number)

        await asyncio.gather(*(one(number) for number in range(12)))
        return done

    assert asyncio.run(ask()) == list(range(12))


def test_cancelled_coroutine_is_dropped_and_the_others_are_answered(sharded, alone):
    async def ask() -> list[Any]:
        tasks = [asyncio.create_task(sharded.agenerate(prompt, **GREEDY)) for prompt in PROMPTS]
        await asyncio.sleep(0)
        tasks[2].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(ask())
    assert isinstance(answers.pop(2), asyncio.CancelledError)
    assert answers == [alone[prompt] for prompt in PROMPTS if prompt != PROMPTS[2]]


def test_pieces_for_coroutines_while_others_ask(sharded, alone):
    async def stream(prompt: str) -> str:
        return prompt + "".join([piece async for piece in sharded.astream(prompt, **GREEDY)])

    async def ask() -> list[str]:
        return await asyncio.gather(*map(stream, PROMPTS), *(sharded.agenerate(p, **GREEDY) for p in PROMPTS))

    assert asyncio.run(ask()) == [alone[prompt] for prompt in PROMPTS * 2]


def test_left_stream_of_a_coroutine_ends_the_answer(sharded, alone):
    async def ask() -> str:
        stream = sharded.astream(PROMPTS[0], max_new_tokens=400, min_new_tokens=400, do_sample=False)
        await anext(stream)
        await stream.aclose()
        return await sharded.agenerate(PROMPTS[0], **GREEDY)

    assert asyncio.run(ask()) == alone[PROMPTS[0]]


def test_errors_of_coroutines_are_those_of_calls(sharded):
    async def ask() -> None:
        with pytest.raises(InputError, match="prompt: an empty list"):
            await sharded.agenerate([])
        with pytest.raises(InputError, match="prompt: one answer comes in pieces"):
            await anext(sharded.astream(["one", "two"]))

    asyncio.run(ask())


@needs("flask")
def test_flask_with_threads(sharded, alone):
    from flask import Flask, request
    from werkzeug.serving import make_server

    app = Flask("served")

    @app.post("/")
    def answer() -> str:
        return sharded.generate(request.get_data(as_text=True), **GREEDY)

    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found: dict[str, str] = {}

    def post(prompt: str) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}", prompt.encode()) as response:
            found[prompt] = response.read().decode()

    threads = [threading.Thread(target=post, args=(prompt,)) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.shutdown()
    assert found == alone


def test_actor_serves_coroutines_and_its_end_gives_everything_back(kjv_tiny, alone):
    """Killed as a replica is that restarts: nothing of it runs its `close`."""
    before, groups = free_cpus(), len(placement_group_table())
    server = ray.remote(num_cpus=1)(Server).remote(kjv_tiny)
    asked = [server.__call__.remote(prompt) for prompt in PROMPTS * 2]
    assert ray.get(asked) == [alone[prompt] for prompt in PROMPTS * 2]
    assert free_cpus() == before - 3
    ray.kill(server)
    until(lambda: free_cpus() == before)
    assert [each["state"] for each in placement_group_table().values()].count("REMOVED") == groups


def test_task_that_forgets_its_model_gives_everything_back(kjv_tiny, sharded):
    before = free_cpus()

    @ray.remote(num_cpus=1, max_calls=1)
    def forget() -> str:
        return dq.ray.load(kjv_tiny, quantization_config="nf4", mesh="tp=2").generate("In", max_new_tokens=2)

    assert ray.get(forget.remote())
    until(lambda: free_cpus() == before)


@needs("fastapi")
def test_replica_of_serve(kjv_tiny, alone):
    from ray import serve

    before = free_cpus()
    deployment = serve.deployment(ray_actor_options={"num_cpus": 1})(Server)
    serve.start(proxy_location="Disabled")  # its web server is not what is tested
    handle = serve.run(deployment.bind(kjv_tiny))
    try:
        asked = [handle.remote(prompt) for prompt in PROMPTS * 2]
        assert [answer.result() for answer in asked] == [alone[prompt] for prompt in PROMPTS * 2]
    finally:
        serve.shutdown()
    until(lambda: free_cpus() == before)


@pytest.fixture
def group(sharded: Any) -> Iterator[PlacementGroup]:
    """Three bundles: one for a caller, and one for each of two workers."""
    made = placement_group([{"CPU": 1}] * 3)
    assert made.wait(60)
    yield made
    remove_placement_group(made)


def test_given_group_is_used_and_stays(group, kjv_tiny, alone):
    """From within it, and one model after the other."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    @ray.remote(num_cpus=1)
    def twice() -> list[str]:
        own, found = ray.util.get_current_placement_group(), []
        with pytest.raises(InputError, match=r"with placement_group=ray\.util\.get_current_placement_group\(\)"):
            dq.ray.load(kjv_tiny, mesh="tp=2", schedule_timeout=1)
        for _ in range(2):
            options = {"quantization_config": "nf4", "mesh": "tp=2", "placement_group": own}
            with dq.ray.load(kjv_tiny, **options) as model:
                found.append(model.generate(PROMPTS[0], **GREEDY))
        return found

    inside = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    before = free_cpus()
    assert before < 2, "no room outside of it"
    assert ray.get(twice.options(scheduling_strategy=inside).remote()) == [alone[PROMPTS[0]]] * 2
    assert free_cpus() == before
    assert placement_group_table(group)["state"] == "CREATED"


def test_given_group_without_room_is_refused(group, kjv_tiny):
    with pytest.raises(InputError, match=r"placement_group: its bundles .* have room for 3 workers .*, 4 are needed"):
        dq.ray.load(kjv_tiny, mesh="tp=4", placement_group=group)
    with pytest.raises(InputError, match=r"have room for 0 workers of {'CPU': 2}, 2 are needed"):
        dq.ray.load(kjv_tiny, mesh="tp=2", placement_group=group, resources=dq.ray.Resources(cpus=2))
    assert placement_group_table(group)["state"] == "CREATED"
