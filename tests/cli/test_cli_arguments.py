"""What the command line itself takes: options, texts and output files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cli_runs import Command, tells


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["laod", "x"], "invalid choice: 'laod'"),
        (["load"], "arguments are required: MODEL"),
        (["load", "x", "--quantt", "nf4"], "unrecognized arguments: --quantt nf4. Did you mean --quant"),
        (["load", "x", "--tensor-parallel-size", "2"], "--tensor-parallel-size 2. Did you mean --tp"),
        (["--quant", "nf4"], "invalid choice: 'nf4'"),
        (["load", "x", "--qua", "nf4"], "unrecognized arguments: --qua nf4"),
        (["load", "x", "--runtime", "mpi"], "argument --runtime: invalid choice: 'mpi'"),
        (["load", "x", "--max-new-tokens", "0"], "argument --max-new-tokens: '0' is not an integer of at least 1"),
        (["load", "x", "--threads", "-2"], "argument --threads: '-2' is not an integer of at least 1"),
        (["load", "x", "--timeout", "nan"], "argument --timeout: 'nan' is not a number of at least 0.1"),
        (["perplexity", "x"], "arguments are required: --text"),
        (["perplexity", "x", "--text", "y", "--window", "1"], "argument --window: '1' is not an integer of at least 2"),
    ],
    ids=lambda value: "_".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_arguments_that_cannot_be(arguments: list[str], pattern: str, command: Command, workdir: Path) -> None:
    done = command(*arguments)
    assert done.code == 2
    assert re.search(re.escape(pattern) + r".*[.?] See 'distquant.* --help'\.$", done.message)
    assert list(workdir.iterdir()) == []


def test_an_unknown_option_points_to_the_help_of_the_command(command: Command, workdir: Path) -> None:
    assert command("load", "x", "--zzz").message.endswith("--zzz. See 'distquant load --help'.")
    assert command("plan", "x", "y").message.endswith("arguments: y. See 'distquant plan --help'.")


def test_no_command_prints_help(command: Command, workdir: Path) -> None:
    done = command()
    assert (done.code, done.err) == (0, "")
    assert "distquant load" in done.out


def test_what_a_spelling_became_is_told_once(
    kjv_tiny: str, command: Command, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distquant.planning.arguments._logged", set())
    done = command("plan", kjv_tiny, "-q", "4bit", "--mesh", "2", "--dtype", "bf16")
    assert done.code == 0
    assert done.err.splitlines() == [
        "distquant: '4bit' is read as quantization_config='nf4' (--quant nf4)",
        "distquant: '2' is read as mesh='tp=2' (--mesh tp=2)",
    ]


def test_verify_without_a_mesh(kjv_tiny: str, refused: Command) -> None:
    tells(refused("verify", kjv_tiny), r"^--mesh: no mesh is given\. Give --mesh twice or more, such as --mesh tp=1")


def test_verify_with_one_mesh(kjv_tiny: str, refused: Command) -> None:
    tells(
        refused("verify", kjv_tiny, "--mesh", "tp=1"),
        r"^--mesh: one mesh cannot be compared\. Give --mesh",
    )


def test_verify_under_a_launcher(kjv_tiny: str, refused: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = refused("verify", kjv_tiny, "--mesh", "tp=2", "--mesh", "tp=2")
    tells(
        done, r"^verify: verify starts the ranks of each mesh itself, and this is rank 0 .*\. Run it without a launcher"
    )


def test_text_file_is_missing(kjv_tiny: str, refused: Command) -> None:
    done = refused("perplexity", kjv_tiny, "--text", "nowhere.txt")
    tells(done, r"^--text: nowhere\.txt cannot be read \(.*No such file.*\)\. Give a UTF-8 text file")


def test_text_is_no_utf8(kjv_tiny: str, refused: Command, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    done = refused("perplexity", kjv_tiny, "--text", tmp_path / "latin.txt")
    tells(done, r"^--text: .*latin\.txt cannot be read \('utf-8' codec .*\)\. Give a UTF-8 text file")


def test_text_is_empty(kjv_tiny: str, refused: Command, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    done = refused("perplexity", kjv_tiny, "--text", tmp_path / "empty.txt")
    tells(done, r"^--text: has 0 tokens, 2 are needed\. Give a longer text")


def test_prompt_is_empty(kjv_tiny: str, refused: Command) -> None:
    tells(refused("load", kjv_tiny, "--prompt", ""), r"^--prompt: has 0 tokens, 1 are needed\. Give a longer text")


def test_prompt_for_a_checkpoint_without_tokenizer(model_of, refused: Command) -> None:
    done = refused("load", model_of("llama-gqa"), "--prompt", "In the beginning")
    tells(done, r"^--prompt: transformers cannot load a tokenizer from /.*\. Put the model's tokenizer\.json there")


@pytest.mark.parametrize(("name", "option"), [("plan", "--json"), ("load", "--report")])
def test_output_that_cannot_be_written_is_told_before_the_work(
    name: str, option: str, kjv_tiny: str, command: Command, workdir: Path
) -> None:
    tells(
        command(name, kjv_tiny, option, "nowhere/out.json"),
        rf"^{option}: the folder .*nowhere does not exist\. Create it",
    )
    tells(command(name, kjv_tiny, option, workdir), rf"^{option}: .* is a folder\. Give the name of a file")


@pytest.mark.parametrize(
    ("option", "value", "pattern"),
    [
        ("--capability", "9", r"^--capability: invalid compute capability '9'\. Write it as 9\.0"),
        ("--dtype", "int8", r"^dtype: cannot load in 'int8'\. Use bfloat16, float16, float32 or auto"),
        ("--staging", "much", r"^staging: invalid size 'much'\. Write it as 24GiB, 512MiB"),
        ("--max-memory", "24 gigs", r"^max_memory: invalid size '24 gigs'\. Write it as 24GiB"),
        ("--revision", "v1", r"^revision: 'v1' was given for the folder .*, which has none\. Leave the revision out"),
    ],
)
def test_option_that_cannot_be(option: str, value: str, pattern: str, kjv_tiny: str, refused: Command) -> None:
    tells(refused("plan", kjv_tiny, option, value), pattern)
