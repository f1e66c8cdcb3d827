"""Through the real torchrun: fingerprints equal one process's, and one rank's failure stops all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import work

SCRIPT = """
import json, os, sys
from pathlib import Path

import torch
torch.set_num_threads(1)
import distquant as dq

path, mesh, quant, out = sys.argv[1:5]
rank = int(os.environ["RANK"])


def fail_on_rank_1(seen):
    if rank == 1:
        raise RuntimeError("the disk of rank 1 is on fire")


progress = fail_on_rank_1 if "--fail" in sys.argv else None
model = dq.load(path, quantization_config=quant, mesh=mesh, progress=progress)
ids = torch.tensor([[5, 17, 99, 3]])
answer = model.generate(ids, max_new_tokens=6, do_sample=False).tolist()
found = {"fingerprint": dq.fingerprint(model), "answer": answer, "rank": model.distquant.comm.rank}
torch.distributed.destroy_process_group()
found["threads"] = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
try:
    model(ids)
except RuntimeError as error:
    found["afterwards"] = str(error)
(Path(out) / f"rank{rank}.json").write_text(json.dumps(found))
"""


GUARD = 400
"""Seconds after which ranks are taken for dead; they give each other up after 600."""


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Two ranks of `SCRIPT`; they are stopped long before ranks would give each other up."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(script), *arguments], capture_output=True, text=True, timeout=GUARD, env=environment, check=False
    )


def test_two_ranks_have_the_bits_of_one(model_of, tmp_path):
    path = model_of("llama-352")
    done = torchrun(tmp_path, path, "tp=2", "nf4-dq", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [one["rank"] for one in found] == [0, 1]
    assert {one["fingerprint"] for one in found} == {work.fingerprint(path, "nf4-dq")}
    assert found[0]["answer"] == found[1]["answer"]
    for one in found:
        assert not [name for name in one["threads"] if "gloo" in name], "they may abort the process at its end"
        assert "process groups were destroyed (destroy_process_group); load it again" in one["afterwards"]


def test_failure_of_one_rank_stops_all(model_of, tmp_path):
    """Rank 0 waits for rows that rank 1 never sends."""
    done = torchrun(tmp_path, model_of("llama-gqa"), "tp=2", "int8", str(tmp_path), "--fail")
    assert done.returncode != 0
    assert "the disk of rank 1 is on fire" in done.stderr
    assert list(tmp_path.glob("rank*.json")) == []
