"""Through real Ray: the bits of one process, and errors that name the shortage or the rank."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import work

import distquant as dq
from distquant import InputError, RankError
from distquant.runtime import ray as runtime

PROMPT = "In the beginning God created"


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[int]:
    """A local Ray with as many CPUs as the test is parametrized with."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(
        num_cpus=request.param,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        configure_logging=False,
    )
    yield request.param
    ray.shutdown()


def free_cpus() -> float:
    """CPUs that are free once the killed workers have given theirs back."""
    deadline = time.monotonic() + 120
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"] and time.monotonic() < deadline:
        time.sleep(0.1)
    return ray.available_resources().get("CPU", 0)


@pytest.mark.parametrize("cluster", [2], indirect=True)
def test_two_workers_have_the_bits_and_the_answer_of_one_process(cluster, kjv_tiny):
    """And at last one of them dies, and is named."""
    from distquant.runtime.answer import generate

    whole = work.exact(kjv_tiny, "nf4-dq")
    seen: list = []
    quant = work.bnb("nf4-dq")
    with dq.ray.load(
        kjv_tiny, quantization_config=quant, mesh="tp=2", dtype="float32", progress=seen.append
    ) as sharded:
        assert sharded.fingerprint() == dq.fingerprint(whole)
        answer = sharded.generate(PROMPT, max_new_tokens=12, do_sample=False)
        assert answer == generate(whole, PROMPT, max_new_tokens=12, do_sample=False)
        sampled = sharded.generate(PROMPT, max_new_tokens=12, do_sample=True, temperature=1.5)
        assert sampled.startswith(PROMPT)
        report = sharded.report()
        assert (report["runtime"], report["world_size"]) == ("ray", 2)
        assert [row["rank"] for row in report["ranks"]] == [0, 1]
        assert sharded.call(lambda model, more: model.distquant.comm.rank + more, 10) == [10, 11]
        with pytest.raises(RankError, match="rank 0 failed: ZeroDivisionError"):
            sharded.call(lambda model: 1 // model.distquant.comm.rank)
        with pytest.raises(RankError, match="rank 1 failed") as caught:
            sharded.call(lambda model: os._exit(3) if model.distquant.comm.rank == 1 else None)
        assert caught.value.rank == 1
    assert ray.is_initialized(), "a Ray that was there before is left running"
    assert free_cpus() == cluster


@pytest.mark.parametrize("cluster", [2], indirect=True)
def test_worker_that_dies_while_loading_is_named(cluster, kjv_tiny, monkeypatch):
    """The other rank waits for its rows, and fails too; the message must be that of the one that died."""

    class Dying(runtime.Worker):
        def _progress(self, seen: Any) -> None:
            if self.rank == 1 and seen.done > seen.total // 2:
                time.sleep(0.5)  # until rank 0 surely waits
                os._exit(3)

    monkeypatch.setattr(runtime, "Worker", Dying)
    with pytest.raises(RankError) as caught:
        dq.ray.load(kjv_tiny, quantization_config="int8", mesh="tp=2")
    assert caught.value.rank == 1
    assert free_cpus() == cluster


@pytest.mark.parametrize("cluster", [1], indirect=True)
def test_group_that_cannot_be_scheduled_names_the_shortage(cluster, kjv_tiny):
    with pytest.raises(InputError, match=r"could not be scheduled within 3 s .*CPU: 2 needed, 1 free"):
        dq.ray.load(kjv_tiny, quantization_config="nf4", mesh="tp=2", schedule_timeout=3)
    assert free_cpus() == cluster


def test_mistakes_cost_no_ray(kjv_tiny):
    with pytest.raises(InputError, match="nf5"):
        dq.ray.load(kjv_tiny, quantization_config="nf5", mesh="tp=2")
    assert not ray.is_initialized()


def test_ray_that_a_load_started_is_stopped(kjv_tiny):
    with dq.ray.load(kjv_tiny, quantization_config="nf4", mesh="tp=1") as sharded:
        assert sharded.fingerprint() == work.fingerprint(kjv_tiny, "nf4")
    assert not ray.is_initialized()
