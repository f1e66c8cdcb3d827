"""Loads in fresh processes print nothing of other libraries, and hide nothing else of them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from distquant.quiet import PREFIXES, WARNINGS, quiet_imports

LOAD = """
import gc, os, sys
import distquant

if __name__ == "__main__":
    kind, model, *quants = sys.argv[1:]
    for quant in quants:
        if kind == "ray":
            with distquant.ray.load(model, quantization_config=quant, mesh="tp=2") as sharded:
                print(sharded.fingerprint())
                sharded.generate("In the beginning", max_new_tokens=2)
            continue
        loaded = distquant.load(model, quantization_config=quant, mesh=None if kind == "local" else "tp=2")
        fingerprint = distquant.fingerprint(loaded)
        if os.environ.get("RANK", "0") == "0":
            print(fingerprint)
        from distquant.runtime.query import generate

        generate(loaded, "In the beginning", max_new_tokens=2)
        generate(loaded, ["In the beginning", "And"], max_new_tokens=2, do_sample=True)
    if kind == "torchrun":
        import torch

        torch.distributed.destroy_process_group()
"""

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

LIBRARIES = {
    "torch": ("none", "gptq-rtn", "awq-rtn", "int4", "fp8-row", "fp8", "mxfp8", "mxfp4", "fbgemm_fp8"),
    "bitsandbytes": ("nf4", "nf4-dq", "fp4", "int8"),
    "torchao": ("torchao-int8", "torchao-fp8"),
    "quanto": ("quanto-int8", "quanto-int4"),
    "hqq": ("hqq",),
}
"""Methods by the library that their modules are of: a process for each library, which imports no other."""


def load(folder: Path, kind: str, model: str, *quants: str) -> tuple[list[str], str]:
    """What a fresh process prints that loads and generates."""
    script = folder / "load.py"
    script.write_text(LOAD)
    launcher = TORCHRUN if kind == "torchrun" else []
    done = subprocess.run(
        [sys.executable, *launcher, str(script), kind, model, *quants],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    return done.stdout.split(), done.stderr


@pytest.mark.parametrize(
    "library", [pytest.param(name, marks=() if name == "bitsandbytes" else pytest.mark.wide) for name in LIBRARIES]
)
def test_a_load_prints_nothing(kjv_tiny: str, tmp_path: Path, library: str) -> None:
    quants = LIBRARIES[library]
    fingerprints, error = load(tmp_path, "local", kjv_tiny, *quants)
    assert error == ""
    assert len(fingerprints) == len(quants), "the fingerprints alone"


@pytest.mark.wide
@pytest.mark.parametrize("kind", ["torchrun", "ray"])
def test_a_load_onto_ranks_prints_nothing(kjv_tiny: str, tmp_path: Path, kind: str) -> None:
    fingerprints, error = load(tmp_path, kind, kjv_tiny, "int8")
    assert error == ""
    assert len(fingerprints) == 1, "the fingerprint alone"


@pytest.mark.parametrize("name", PREFIXES)
def test_other_messages_are_still_logged(name: str, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        quiet_imports()
    logger = logging.getLogger(name)
    caplog.set_level(logging.WARNING, logger=name)  # a test before may have made it quieter
    logger.warning("%sthis and that", PREFIXES[name])
    logger.warning("out of memory")
    assert [record.getMessage() for record in caplog.records] == ["out of memory"]
    assert len({id(each) for each in logger.filters}) == len(logger.filters)


@pytest.mark.parametrize("module", WARNINGS)
def test_other_warnings_are_still_shown(module: str) -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        for _ in range(2):
            quiet_imports()
        count = len(warnings.filters)
        quiet_imports()
        assert len(warnings.filters) == count, "added once"
        for text, where in ((WARNINGS[module], module), (WARNINGS[module], "mine"), ("another", module)):
            warnings.warn_explicit(text, DeprecationWarning, "file.py", 1, module=where, registry={})
    assert [str(each.message) for each in shown] == [WARNINGS[module], "another"]
