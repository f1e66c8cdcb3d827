"""Files that never end and meshes that no machine has: refused at once, with one message and exit code 2."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_runs import COMMANDS, Command, tells

import distquant as dq
from distquant.errors import InputError
from distquant.files import CONFIG_BYTES, INDEX_BYTES, TEXT_BYTES, TOKENIZER_BYTES
from distquant.sharding.mesh import MOST_RANKS, Mesh

INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00003.safetensors"


@pytest.fixture(autouse=True)
def guard() -> Iterator[None]:
    """Ends a test that waits for a pipe, long after it should have ended by itself."""

    def give_up(*_: object) -> None:
        raise TimeoutError("still waiting")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


KINDS = pytest.mark.parametrize(("make", "kind"), [(pipe, "named pipe"), (device, "device"), (folder, "folder")])


@pytest.fixture
def model(kjv_tiny: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kjv_tiny, tmp_path / "model"))


def replaced(path: Path, make: Callable[[Path], None]) -> Path:
    path.unlink(missing_ok=True)
    make(path)
    return path


def sparse(path: Path, size: int) -> None:
    path.unlink(missing_ok=True)
    path.touch()
    os.truncate(path, size)


@COMMANDS
@KINDS
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", INDEX, SHARD, "quanto_qmap.json"])
def test_a_file_of_a_checkpoint(name, file, make, kind, model: Path, refused: Command) -> None:
    replaced(model / file, make)
    tells(refused(name, model), rf"{file}: cannot be read \(it is a {kind}, and must be a regular file\)\. \S")


@KINDS
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_file_of_a_tokenizer(file, make, kind, model: Path, refused: Command) -> None:
    """Told before the load, and by `generate` itself where a tokenizer is asked for only then."""
    pattern = rf"{file}: cannot be read \(it is a {kind}, and must be a regular file\)"
    loaded = dq.load(model) if file == "tokenizer.json" else None
    replaced(model / file, make)
    tells(refused("load", model, "--prompt", "In"), pattern)
    if loaded is not None:
        from distquant.runtime.answer import generate

        with pytest.raises(InputError, match=pattern):
            generate(loaded, "In")


@KINDS
def test_a_quantization_and_a_text(make, kind, model: Path, command: Command, tmp_path: Path) -> None:
    given = replaced(tmp_path / "given.json", make)
    reason = rf"cannot be read \(it is a {kind}, and must be a regular file\)"
    tells(command("plan", model, "--quant", given), rf"given\.json: {reason}")
    tells(command("perplexity", model, "--text", given), rf"--text: .*given\.json {reason}")


@KINDS
def test_a_gguf_file_and_a_model(make, kind, tmp_path: Path, command: Command) -> None:
    given = replaced(tmp_path / "model.gguf", make)
    assert command("plan", given).code == 2
    assert command("plan", given / "none").code == 2


@pytest.mark.parametrize(
    ("file", "limit"), [("config.json", CONFIG_BYTES), ("generation_config.json", CONFIG_BYTES), (INDEX, INDEX_BYTES)]
)
def test_a_file_of_a_checkpoint_over_its_limit(file, limit, model: Path, refused: Command) -> None:
    sparse(model / file, limit + 1)
    tells(
        refused("plan", model), rf"{file}: cannot be read \(it has {limit + 1} bytes or more, and at most {limit} are"
    )


def test_other_files_over_their_limits(model: Path, command: Command, tmp_path: Path) -> None:
    given = tmp_path / "given.json"
    sparse(given, CONFIG_BYTES + 1)
    tells(command("plan", model, "--quant", given), f"at most {CONFIG_BYTES} are read")
    sparse(given, TEXT_BYTES + 1)
    tells(command("perplexity", model, "--text", given), f"at most {TEXT_BYTES} are read")
    sparse(model / "tokenizer.json", TOKENIZER_BYTES + 1)
    tells(command("load", model, "--prompt", "In"), f"at most {TOKENIZER_BYTES} are read")


def test_a_large_file_that_nobody_reads_is_left_alone(model: Path, command: Command) -> None:
    sparse(model / "trainer_state.json", TOKENIZER_BYTES + 1)
    replaced(model / "notes", pipe)
    assert command("load", model, "--prompt", "In", "--max-new-tokens", "1").code == 0


def test_a_cached_model_is_links_to_files(kjv_tiny: str, tmp_path: Path, monkeypatch, command: Command) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / "abc"
    for made in (repo / "blobs", repo / "refs", snapshot):
        made.mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    for number, file in enumerate(sorted(Path(kjv_tiny).iterdir())):
        shutil.copy(file, repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert command("load", "org/name", "--prompt", "In", "--max-new-tokens", "1").code == 0
    replaced(repo / "refs" / "main", pipe)
    tells(command("plan", "org/name"), r"refs/main: cannot be read \(it is a named pipe")


@COMMANDS
@pytest.mark.parametrize(
    "mesh",
    ["tp=99999999999", "dp=99999999999", "ep=16385", "dp=200,tp=200", "dp=9999,ep=9999,tp=9999", "tp=" + "9" * 5000],
)
def test_a_mesh_that_no_machine_has(name, mesh, kjv_tiny: str, refused: Command) -> None:
    tells(
        refused(name, kjv_tiny, "--mesh", mesh), rf"^mesh: .*ranks, and at most {MOST_RANKS} can be planned for\. Give"
    )


@pytest.mark.parametrize("sizes", [{"tp": 10**11}, {"dp": 129, "tp": 128}, {"tp": 0}, {"ep": -1}, {"dp": 2.0}])
def test_such_a_mesh_in_python(sizes, kjv_tiny: str) -> None:
    with pytest.raises(InputError, match=r"^mesh: "):
        Mesh(**sizes)
    mesh = ",".join(f"{axis}={size}" for axis, size in sizes.items())
    for run in (dq.plan, dq.load):
        with pytest.raises(InputError, match=r"^mesh: "):
            run(kjv_tiny, mesh=mesh)


def test_the_largest_mesh_is_planned(kjv_tiny: str) -> None:
    assert dq.plan(kjv_tiny, mesh=f"dp={MOST_RANKS}").mesh.size == MOST_RANKS
