"""Commands as functions of the Python API: `inspect`, `doctor`, `verify`; and `save`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from distquant.cli.flags import SPELLINGS
from distquant.config import parse
from distquant.dtypes import dtype_name
from distquant.errors import CheckFailed, DistquantError, InputError
from distquant.options import DECLARED, Model, PlanOptions, RunOptions
from distquant.planning.arguments import early_classes, read_arguments
from distquant.planning.request import check_model
from distquant.quiet import quiet_imports
from distquant.sharding.mesh import Mesh


class Text(str):
    """Text of several lines, which Python's prompt and notebooks show as it is."""

    def __repr__(self) -> str:
        return str(self)


def inspect(model: Model, *, revision: str | None = None, cache_dir: str | os.PathLike[str] | None = None) -> Text:
    """Returns a text that describes a checkpoint: its tensors, and how it is quantized. Reads headers only.

    Args:
        model: Folder of a safetensors checkpoint, a GGUF file, or the id of a model in the Hugging Face cache.
        revision: Revision of a cached id.
        cache_dir: Folder in which a cached id is looked up, in place of the Hugging Face cache.

    Raises:
        InputError: with every fault of the checkpoint.
    """
    check_model(model)
    quiet_imports()
    from distquant.checkpoint import open_checkpoint
    from distquant.cli.render import inspect_parts

    checkpoint = open_checkpoint(model, revision=revision, cache_dir=cache_dir)
    return Text("\n".join(inspect_parts(checkpoint)))


def doctor(quant: str | None = None) -> Text:
    """Returns a text that says what this machine can run, and what is missing.

    Args:
        quant: One method alone, by its short name.

    Raises:
        InputError: the name is unknown.
    """
    parse(quant, early_classes())
    quiet_imports()
    from distquant.cli.doctor import doctor_parts

    return Text("\n".join(doctor_parts(quant)))


def verify(
    model: Model,
    quantization_config: Any = None,
    *,
    mesh: Sequence[str | int | Mesh] = ("tp=1", "tp=2"),
    runtime: str | None = None,
    threads: int | None = None,
    **options: Any,
) -> dict[str, str]:
    """Loads a model at several meshes, and compares the bits of its weights.

    Each mesh has processes of its own, which `distquant verify` starts on this machine: this process loads nothing.

    Args:
        model: As of `load`.
        quantization_config: As of `load`.
        mesh: Two meshes or more.
        runtime: `local`, `torchrun` or `ray`. Default: local for one rank, torchrun for more.
        threads: Torch threads of a rank.
        options: Options of `load` that the command has, too.

    Returns:
        The fingerprint at each mesh; all of them are equal.

    Raises:
        CheckFailed: the fingerprints differ.
        InputError: with every problem of the arguments.
        DistquantError: a load failed; the message is its own.
    """
    meshes = list(mesh) if isinstance(mesh, Sequence) and not isinstance(mesh, str) else [mesh]
    if len(meshes) < 2:
        raise InputError.one("mesh", f"{mesh!r} is one mesh, which cannot be compared", "Give two: ('tp=1', 'tp=2')")
    arguments = {**_options(options), "model": model, "quantization_config": quantization_config}
    for each in meshes:
        request, run = read_arguments("verify", {**arguments, "mesh": each})
    flags = [flag for each in meshes for flag in ("--mesh", str(Mesh.parse(each)))]
    given = {**_values(request), **_values(run), "runtime": runtime, "threads": threads}
    flags += [flag for name, value in given.items() if name != "mesh" for flag in _flag(name, value)]
    return _verify([os.fspath(model), *flags])


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of `verify` with their defaults, and other arguments under `aliases`."""
    left_out = (*DECLARED, "device_map")
    known = {field.name: field.default for kind in (PlanOptions, RunOptions) for field in fields(kind)}
    known = {name: default for name, default in known.items() if name not in left_out}
    own = {name: value for name, value in given.items() if name in known}
    return {**known, **own, "aliases": {name: value for name, value in given.items() if name not in known}}


def _values(options: PlanOptions | RunOptions) -> dict[str, Any]:
    """Returns the options that differ from their defaults."""
    kind = PlanOptions if isinstance(options, PlanOptions) else RunOptions
    values = {field.name: (getattr(options, field.name), field.default) for field in fields(kind)}
    return {name: value for name, (value, default) in values.items() if value != default}


def _flag(name: str, value: Any) -> list[str]:
    """Returns an option and its value as the command line takes them; nothing for None."""
    if value is None:
        return []
    flag = SPELLINGS.get(name, {}).get("flags", ("--" + name.replace("_", "-"),))[-1]
    if value is True:
        return [flag]
    if value is False:
        return [f"--no-{flag.removeprefix('--')}"]
    if name == "quantization_config" and not isinstance(value, (str, os.PathLike)):
        config = parse(value, early_classes())
        assert config is not None
        return [flag, json.dumps(config.to_dict(extras=True))]
    return [flag, dtype_name(value) if name == "dtype" else str(value)]


def _verify(arguments: list[str]) -> dict[str, str]:
    """Runs the command; returns its fingerprints by mesh, or raises its error."""
    place = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": place}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "distquant", "verify", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    message = done.stderr.strip().rpartition("distquant: ")[2]
    if done.returncode == 1:
        raise CheckFailed(message)
    if done.returncode != 0:
        raise DistquantError(message or f"distquant verify ended with exit code {done.returncode}")
    found = re.findall(r"^([0-9a-f]{32})  (\S+) \(", done.stdout, re.MULTILINE)
    return {mesh: fingerprint for fingerprint, mesh in found}


def save(model: Any, folder: str | os.PathLike[str]) -> None:
    """Saves a loaded model where `transformers` can load it from: a model that one process holds.

    Args:
        model: As `load` returned it.
        folder: Gets `config.json` and safetensors files.

    Raises:
        InputError: the model is divided over ranks, or has a form that `transformers` would not read.
    """
    loaded = getattr(model, "distquant", None)
    if loaded is None:
        fault = f"{type(model).__name__} was not loaded by distquant"
        raise InputError.one("model", fault, "Call its own save_pretrained")
    if loaded.plan.mesh.size > 1:
        fault = f"the model is divided over {loaded.plan.mesh}, and its parts cannot be joined in files yet"
        fix = "Load it in one process, without a mesh, and save that; adapters (PEFT) are saved at every width"
        raise InputError.one("save", fault, fix)
    model.save_pretrained(os.fspath(folder))
