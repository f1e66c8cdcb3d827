"""Workers on Ray get the GPUs that they ask for, by default one where the cluster has any, and see no others."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import ray

import distquant as dq


@pytest.fixture
def cluster_with_gpus() -> Iterator[None]:
    """A local Ray that believes to have two GPUs."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, **quiet)
    yield
    ray.shutdown()


@pytest.mark.wide
def test_workers_see_the_gpus_that_they_ask_for(cluster_with_gpus, kjv_tiny, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def seen(_: object) -> str:  # inside: Ray then sends the function itself
        return os.environ.get("CUDA_VISIBLE_DEVICES", "all")

    for resources, expected in [(dq.ray.Resources(), {"0", "1"}), (dq.ray.Resources(gpus=0), {""})]:
        with dq.ray.load(kjv_tiny, quantization_config="nf4", mesh="tp=2", resources=resources) as sharded:
            assert set(sharded.call(seen)) == expected
