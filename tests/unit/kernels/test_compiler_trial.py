"""A machine without a C compiler is told so, by what Triton itself raises there."""

from __future__ import annotations

from pathlib import Path

import pytest
from triton.runtime.build import compile_module_from_src

from distquant.kernels.compiler_trial import failure

MODULE = """
#include <Python.h>
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "distquant_trial"};
PyMODINIT_FUNC PyInit_distquant_trial(void) { return PyModule_Create(&definition); }
"""


def use() -> None:
    """Triton's way to its driver, as far as it goes without a GPU."""
    compile_module_from_src(MODULE, "distquant_trial")


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


INSTALL = (
    "Install a C compiler and Python's headers (apt install gcc python3-dev), or set CC to one; "
    "kernel='reference' quantizes without Triton, slowly"
)


def test_no_compiler_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    problem = failure(use)
    assert problem is not None
    assert problem.where == "kernel"
    assert problem.what.startswith("Triton cannot compile its kernels here: Failed to find C compiler")
    assert problem.fix == INSTALL


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/nowhere/cc", "no C compiler '/nowhere/cc'"),
        ("false", "the C compiler false failed with exit status 1"),
    ],
)
def test_a_compiler_that_does_not_work(monkeypatch: pytest.MonkeyPatch, compiler: str, reason: str) -> None:
    monkeypatch.setenv("CC", compiler)
    problem = failure(use)
    assert problem is not None
    assert (problem.what, problem.fix) == (f"Triton cannot compile its kernels here: {reason}", INSTALL)


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/nowhere")
    problem = failure(use)
    assert problem is not None
    assert "/proc/nowhere" in problem.what


def test_a_compiler_that_works() -> None:
    assert failure(use) is None


def test_a_defect_of_the_kernels_is_not_called_a_lack() -> None:
    with pytest.raises(TypeError):
        failure(lambda: len(3))  # type: ignore[arg-type]
