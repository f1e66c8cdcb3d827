"""Meshes, memory and devices that cannot be."""

from __future__ import annotations

import pytest
from cli_runs import COMMANDS, Command, tells

from distquant.runtime import measure


@COMMANDS
@pytest.mark.parametrize("mesh", ["pt=2", "tp=0", "tp", "tp=2,tp=2", "2,2"])
def test_mesh_that_is_none(mesh: str, name: str, kjv_tiny: str, refused: Command) -> None:
    pattern = rf"^mesh: '.+' in '{mesh}' is not axis=size.*\. Write it as 'tp=2' or 'dp=2,tp=4'; axes are dp, ep, tp"
    tells(refused(name, kjv_tiny, "--mesh", mesh), pattern)


@COMMANDS
def test_experts_axis_for_a_model_without_experts(name: str, kjv_tiny: str, refused: Command) -> None:
    tells(refused(name, kjv_tiny, "--mesh", "ep=2"), r"^mesh: ep=2, and LlamaForCausalLM has no experts\. Use tp")


def test_mesh_of_many_ranks_in_one_process(kjv_tiny: str, refused: Command) -> None:
    pattern = r"^mesh: tp=2 needs 2 ranks, and the runtime 'local' is one process\. Use --runtime torchrun or"
    tells(refused("load", kjv_tiny, "--mesh", "tp=2", "--runtime", "local"), pattern)


@pytest.mark.parametrize("runtime", ["torchrun", "ray"])
def test_more_ranks_than_the_machine_can_start(
    runtime: str, kjv_tiny: str, refused: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "host_memory", lambda: 512 << 20)
    done = refused("load", kjv_tiny, "--mesh", "dp=2", "--runtime", runtime)
    pattern = r"^mesh: 2 ranks on this machine need 800\.00 MiB for their processes, 512\.00 MiB are free\. Use fewer"
    tells(done, pattern)


@COMMANDS
def test_model_without_a_parallel_plan(name: str, gpt2: str, refused: Command) -> None:
    pattern = r"^mesh: GPT2LMHeadModel has no tensor-parallel plan, tp=2 needs one\. Use tp=1, or device_map='auto'"
    tells(refused(name, gpt2, "--mesh", "tp=2"), pattern)


@COMMANDS
def test_too_little_memory(name: str, kjv_tiny: str, refused: Command) -> None:
    done = refused(name, kjv_tiny, "--quant", "nf4", "--max-memory", "1MiB", "--staging", "4MiB")
    pattern = (
        r"^rank 0: needs 432\.00 KiB quantized \+ 1\.00 MiB unquantized \+ 4\.00 MiB load buffer = 5\.42 MiB, "
        r"and 921\.60 KiB of 1\.00 MiB \(max_memory\) may be used\. Use more ranks"
    )
    tells(done, pattern)


def test_too_little_memory_on_many_ranks(kjv_tiny: str, refused: Command) -> None:
    done = refused("load", kjv_tiny, "--max-memory", "1MiB", "--mesh", "tp=2")
    tells(done, r"^rank \d \(and 1 more\): needs 0 B quantized \+ 1\.25 MiB unquantized \+ 64\.06 MiB load buffer = ")


@pytest.mark.parametrize("memory", ["1MiB", '{"cpu": "1MiB"}'])
def test_too_little_memory_on_a_device(memory: str, kjv_tiny: str, refused: Command) -> None:
    done = refused("load", kjv_tiny, "--max-memory", memory, "--device-map", "cpu")
    tells(done, r"^device_map: cpu: its modules take 2\.50 MiB, max_memory allows 1\.00 MiB\. Move modules to another")


@COMMANDS
@pytest.mark.parametrize(
    ("device_map", "pattern"),
    [
        (
            "atuo",
            r"^device_map: invalid device 'atuo' \(for the whole model\)\. Give 'auto', 'cpu', 'disk', or the number",
        ),
        ('{"": "cpu", "lm_head": "meta"}', r"^device_map: invalid device 'meta' \(for lm_head\)\. Give 'auto'"),
        ('{"": "cpu", "lm_haed": "cpu"}', r"^device_map: 'lm_haed' names no module of LlamaForCausalLM\. Remove or"),
        ('{"model": "cpu"}', r"^device_map: .*does not give any device .*lm_head\.weight\. Give every module a device"),
        ('{"model": ', r"^device_map: invalid JSON \(.*\)\. Write it as"),
    ],
    ids=["no-device", "meta", "no-module", "incomplete", "no-json"],
)
def test_device_map_that_cannot_be(device_map: str, pattern: str, name: str, kjv_tiny: str, refused: Command) -> None:
    tells(refused(name, kjv_tiny, "--device-map", device_map), pattern)


def test_device_that_this_machine_lacks(kjv_tiny: str, refused: Command) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("it has one")
    pattern = r"^device_map: 'cuda:0' is given, and the devices here are of type 'cpu'\. Map the modules to devices"
    tells(refused("load", kjv_tiny, "--device-map", "0"), pattern)


@COMMANDS
def test_device_map_beside_a_mesh(name: str, kjv_tiny: str, refused: Command) -> None:
    done = refused(name, kjv_tiny, "--device-map", "cpu", "--mesh", "tp=2")
    tells(
        done, r"^device_map: given together with mesh tp=2 \(2 ranks\)\. Use a mesh to split the model, or a device_map"
    )


@COMMANDS
def test_memory_of_devices_without_a_device_map(name: str, kjv_tiny: str, refused: Command) -> None:
    done = refused(name, kjv_tiny, "--max-memory", '{"0": "1GiB"}')
    tells(
        done, r"^max_memory: sizes of 0 are given without a device_map\. Give one size for every rank, or device_map="
    )
