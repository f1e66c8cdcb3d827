"""The launchers start as many ranks as they say, as far as this machine can run them.

`torchrun.sh` and `ray_job.py` are run by a code block of docs/command-line.md (see test_docs_blocks.py).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import distquant as dq
from distquant.sharding.mesh import Mesh

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = ROOT / "launchers"

GUARD = 400
"""Seconds after which ranks are taken for dead; they give each other up after 600."""


def run(command: list[str], **environment: str) -> str:
    """Standard output of a command that must succeed; whatever it has started ends with it."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    try:
        out, err = process.communicate(timeout=GUARD)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"{out[-3000:]}\n{err[-5000:]}"
    return out


def test_accelerate_starts_two_ranks(kjv_tiny: str) -> None:
    """Runs a script, which needs all its ranks from the launcher, and so the example as well."""
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    config = ["--config_file", str(LAUNCHERS / "accelerate.yaml")]
    output = run([*launch, *config, str(ROOT / "examples" / "sharded_lora.py"), kjv_tiny, "4"])
    assert re.search(r"^epoch  1  loss \d", output, re.M)
    assert "ranks agree on every loss: True" in output
    assert "the quantized weights are untouched: True" in output


STUBS = {
    # Slurm expands a list of nodes to one name a line; both nodes are this machine
    "scontrol": '[ "$*" = "show hostnames node[1-2]" ] || exit 64\necho localhost\necho localhost',
    # and it starts the command once on each node
    "srun": """
while [ "${1#--}" != "$1" ]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & pids="$pids $!"; done
for pid in $pids; do wait $pid || { kill $pids; exit 1; }; done""",
    "torchrun": f'exec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"',
}


@pytest.mark.wide
def test_slurm_script_loads_over_two_nodes(kjv_tiny: str, tmp_path: Path) -> None:
    """With stand-ins for the two commands of Slurm, and a real torchrun for each node."""
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "42"}
    script = ["bash", str(LAUNCHERS / "slurm.sbatch"), kjv_tiny, "--quant", "nf4-dq", "--prompt", "In the beginning"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    output = run(script, PATH=path, RANKS_PER_NODE="1", PORT=str(port), **slurm)
    assert "mesh tp=2" in output
    assert "In the beginning of the" in output
    assert f"fingerprint {dq.fingerprint(dq.load(kjv_tiny, quantization_config='nf4-dq'))}" in output


def test_slurm_directives_match_what_the_script_computes() -> None:
    text = (LAUNCHERS / "slurm.sbatch").read_text(encoding="utf-8")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.M))
    assert text.count("#SBATCH") == len(options)
    assert options["ntasks-per-node"] == "1"  # one torchrun a node, which starts the ranks
    assert f"SLURM_GPUS_ON_NODE:-{options['gpus-per-node']}" in text


@pytest.fixture(scope="module")
def ray_job() -> Any:
    spec = importlib.util.spec_from_file_location("ray_job", LAUNCHERS / "ray_job.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kuberay_fits_this_repository(ray_job: Any) -> None:
    """Its entry point, versions, ranks and volumes; only a cluster can say more."""
    import yaml

    job = yaml.safe_load((LAUNCHERS / "kuberay.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    python, script, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert python == "python"
    assert ROOT / script.removeprefix("/opt/distquant/") == LAUNCHERS / "ray_job.py"
    cluster = job["spec"]["rayClusterSpec"]
    (pinned,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert cluster["rayVersion"] == pinned
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"]
    gpus = 0
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        gpus += group.get("replicas", 1) * int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
    parsed = ray_job.parser().parse_args(arguments)
    assert Mesh.parse(parsed.mesh).size == gpus
    assert any(parsed.model.startswith(mount["mountPath"]) for mount in container["volumeMounts"])
