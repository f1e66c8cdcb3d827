"""Expert parallelism through the real torchrun and the real Ray."""

from __future__ import annotations

import json

import ray
import work
from test_torchrun import torchrun

import distquant as dq


def test_torchrun_deals_out_experts(moe_of, tmp_path):
    path = moe_of("mixtral")
    done = torchrun(tmp_path, path, "ep=2", "nf4-dq", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert {one["fingerprint"] for one in found} == {work.fingerprint(path, "nf4-dq")}
    assert found[0]["answer"] == found[1]["answer"]


def test_ray_deals_out_experts(moe_of):
    path = moe_of("gpt-oss")

    def held(model: object) -> int:
        return model.distquant.report.quantized_bytes  # type: ignore[attr-defined]

    with dq.ray.load(path, quantization_config="nf4-dq", mesh="ep=2") as sharded:
        assert sharded.fingerprint() == work.fingerprint(path, "nf4-dq")
        assert sharded.call(held) == [row.quantized for row in sharded.plan.memory]
    assert not ray.is_initialized()
