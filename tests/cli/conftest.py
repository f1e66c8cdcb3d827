"""The command line in this process, in an empty working directory; and small checkpoints of other kinds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runs import Command, Run


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], workdir: Path) -> Command:
    """Runs `distquant ARGUMENTS` in `workdir`; loads on one thread, as the models are small."""
    from distquant.cli.main import main

    def run(*arguments: object) -> Run:
        capfd.readouterr()
        if arguments[:1] in (("load",), ("verify",), ("perplexity",)):
            arguments = (*arguments, "--threads", "1")
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse ends so
            assert isinstance(end.code, int)
            code = end.code
        out, err = capfd.readouterr()
        return Run(code, out, err)

    return run


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty current directory of a command; what the command line changes in this process is put back."""
    folder = tmp_path / "workdir"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("OMP_NUM_THREADS", "TRANSFORMERS_VERBOSITY", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, {"OMP_NUM_THREADS": "1"}.get(name, "error")))
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are small, and the command line would leave its own number behind."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def refused(command: Command, workdir: Path) -> Command:
    """Runs a command that must be refused without a file written: asks for every file that it could write."""

    def run(name: str, *arguments: object) -> Run:
        wanted = {"plan": ["--json", "out.json", "--html", "out.html"], "load": ["--report", "out.json"]}.get(name, [])
        done = command(name, *arguments, *wanted)
        assert list(workdir.iterdir()) == [], "something was written"
        return done

    return run


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A GPT-2, saved by transformers: no tensor-parallel plan, and weights stored `[in, out]`."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2") / "model"
    torch.manual_seed(0)
    shape = {"vocab_size": 100, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def llama_nf4(model_of, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama that transformers and bitsandbytes quantized to NF4, and saved so."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("nf4") / "model"
    model = AutoModelForCausalLM.from_pretrained(
        model_of("llama-gqa"), dtype=torch.bfloat16, quantization_config=config
    )
    model.save_pretrained(folder)
    return str(folder)
