"""A caller's process group may be of NCCL alone, and ranks may be on different machines."""

from __future__ import annotations

import callers_groups
import work


def test_a_callers_group_of_gpus_alone_loads_and_generates(ranks, model_of, tmp_path):
    path = model_of("llama-gqa")
    (one, drawn), (other, same) = ranks.run(2, callers_groups.in_a_group_of_gpus_alone, path, str(tmp_path / "store"))
    assert one == other == work.fingerprint(path, "nf4-dq")
    assert len(drawn) == 10
    assert drawn == same


def test_the_rank_with_least_memory_counts(ranks, model_of):
    for told in ranks.run(2, callers_groups.with_less_memory_on_rank_1, model_of("llama-gqa")):
        assert told["memory"] == 1 << 30, "two ranks on this machine"
        assert told["source"] == "free on the host, divided by its ranks, rank 1 has least"
