"""How ranks join: a process group that exists, a launcher's variables, ports in use, and long temporary folders."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import joining
import pytest
import torch
import work

import distquant as dq


@pytest.mark.parametrize("asked", [joining.waiting_alone, joining.collecting_alone])
def test_timeout_holds_in_a_process_group_that_exists(ranks, model_of, asked):
    """The group of these ranks waits for 300 s."""
    assert "Timed out waiting 4000ms" in ranks.run(2, asked, model_of("llama-gqa"), "tp=2", 4.0)[0]


def test_timeout_holds_on_an_axis_of_some_ranks(ranks, model_of):
    assert "Timed out waiting 6000ms" in ranks.run(4, joining.waiting_alone, model_of("llama-gqa"), "dp=2,tp=2", 6.0)[0]


def test_ranks_with_different_timeouts_are_told(ranks, model_of):
    for told in ranks.run(2, joining.own_timeout, model_of("llama-gqa"), "tp=2", [5.0, None]):
        assert told == "timeout: ranks were given different values (5.0, None). Give all ranks the same"


def test_launched_without_a_mesh_names_both(ranks, model_of):
    for told in ranks.run(2, joining.without_mesh, model_of("llama-gqa")):
        fix = "Give mesh tp=2 to divide the model over them, or mesh dp=2 for a whole one on each"
        assert told == f"mesh: tp=1, which is the default, needs one rank, the launcher started 2. {fix}"


def test_rank_of_one_without_an_address_is_alone(monkeypatch, model_of):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    path = model_of("llama-gqa")
    assert dq.fingerprint(dq.load(path, quantization_config="nf4")) == work.fingerprint(path, "nf4")
    assert not torch.distributed.is_initialized()


def test_command_line_of_one_rank_without_an_address(kjv_tiny):
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1"}
    command = [sys.executable, "-m", "distquant", "load", kjv_tiny, "--quant", "nf4"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_missing_variables_of_a_launcher_are_named_all(monkeypatch, model_of):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "zero")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(dq.InputError) as caught:
        dq.load(model_of("llama-gqa"), mesh="tp=2")
    assert [problem.where for problem in caught.value.problems] == ["RANK", "MASTER_PORT", "MASTER_ADDR"]
    assert "'zero' is not a number" in str(caught.value)


def test_port_in_use_is_named(monkeypatch, model_of):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        own = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in own.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(dq.InputError) as caught:
            dq.load(model_of("llama-gqa"), mesh="tp=2")
    fix = "Set MASTER_PORT to a free one; torchrun --standalone finds one itself"
    assert str(caught.value) == f"MASTER_PORT: another process listens at 127.0.0.1:{port} already. {fix}"
    assert not torch.distributed.is_initialized()


def deep(folder: Path) -> str:
    """A folder whose path is too long for a socket in it."""
    made = folder / ("d" * 60) / ("e" * 60)
    made.mkdir(parents=True)
    return str(made)


@pytest.mark.parametrize("runtime", ["torchrun", "ray"])
def test_long_temporary_folders(kjv_tiny, tmp_path, runtime):
    environment = {**os.environ, "TMPDIR": deep(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_TMPDIR", None)
    command = [sys.executable, "-m", "distquant", "load", kjv_tiny, "--quant", "nf4", "--mesh", "tp=2"]
    done = subprocess.run(
        [*command, "--runtime", runtime], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert work.fingerprint(kjv_tiny, "nf4")[:16] in done.stdout


def test_long_folder_that_was_given_to_ray_is_named(kjv_tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", deep(tmp_path))
    with pytest.raises(dq.InputError, match=r"RAY_TMPDIR: '.*' is too long: .* 107 bytes\. Set RAY_TMPDIR to a folder of"):
        dq.ray.load(kjv_tiny, quantization_config="nf4", mesh="tp=1")


@pytest.mark.parametrize("how", ["forward", "base", "tuple", "config", "generate"])
@pytest.mark.parametrize("family", ["llama-gqa", "neox-per-head"])
def test_attention_weights_are_of_all_heads(ranks, model_of, family, how):
    path = model_of(family)
    whole = joining.attention_weights(path, None, how)
    for found in ranks.run(2, joining.attention_weights, path, "tp=2", how):
        assert len(found) == len(whole) > 0
        for theirs, expected in zip(found, whole, strict=True):
            torch.testing.assert_close(theirs, expected)


def test_attention_weights_of_uneven_heads(ranks, model_of):
    path = model_of("llama-gqa")
    whole = joining.attention_weights(path, None, "forward")
    for found in ranks.run(3, joining.attention_weights, path, "tp=3", "forward"):
        torch.testing.assert_close(found, whole)


def test_gradient_of_attention_weights(ranks, model_of):
    path = model_of("llama-gqa")
    expected = joining.gradient_of_weights(path, None)
    for found in ranks.run(2, joining.gradient_of_weights, path, "tp=2"):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_attention_weights_that_nobody_asked_for_cost_nothing(ranks, model_of):
    path = model_of("llama-gqa")
    unasked, asked = (ranks.run(2, joining.reductions_of_a_forward, path, way)[0] for way in (False, True))
    assert asked > unasked
