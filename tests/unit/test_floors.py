"""A module imports only from floors below its own, and heavy or optional libraries only where they belong.

The floors are those of the design, one line each, from the bottom up. Imports inside functions and under TYPE_CHECKING
count: they are dependencies all the same. Within one package modules may use each other, but not in a circle.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from absent import run_without

import distquant

PACKAGE = Path(distquant.__file__).parent

FLOORS = [
    ["tables", "strict_json"],
    [
        "errors",
        "version",
        "dtypes",
        "old_names",
        "garbage_collection",
        "files",
        "stamps",
        "threads",
        "process_state",
        "memory",
        "activity",
    ],
    [
        "accelerator",
        "environment",
        "units",
        "quiet",
        "outputs",
        "interpreter_end",
        "patterns",
        "whole_numbers",
        "left_behind",
    ],
    ["sharding", "parallel.comm"],
    ["checkpoint", "config"],
    ["model"],
    ["kernels"],
    ["options"],
    ["progress"],
    ["quantization"],
    ["planning"],
    ["parallel", "loading.stream"],
    ["loading"],
    ["verification"],
    ["runtime"],
    ["api"],
    ["schemes", "layout"],  # old names
    ["cli"],
    ["__main__"],
]
"""A name stands for the module or package and all in it, unless a longer name is listed."""

MODULES = sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    """`sharding.mesh` for `distquant/sharding/mesh.py`, `sharding` for its `__init__.py`, "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> tuple[int, str]:
    """Number and name of a module's floor."""
    while module:
        for number, names in enumerate(FLOORS):
            if module in names:
                return number, module
        module = module.rpartition(".")[0]
    raise LookupError("no floor")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Everything that a file imports, wherever in it: dotted name and line."""
    known = {dotted(module) for module in MODULES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are written in full"
            base = node.module or ""
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                is_module = whole.removeprefix("distquant.") in known
                yield whole if is_module else base, node.lineno


def own(name: str) -> str | None:
    """The module of this package that an import means."""
    return name.removeprefix("distquant").removeprefix(".") if name.split(".")[0] == "distquant" else None


@pytest.mark.parametrize("path", [p for p in MODULES if dotted(p)], ids=dotted)
def test_a_module_imports_only_from_floors_below_its_own(path: Path) -> None:
    module = dotted(path)
    mine, name = floor_of(module)
    for imported, line in imports(path):
        target = own(imported)
        if not target:
            continue
        theirs, their_name = floor_of(target)
        same_package = name == their_name
        assert theirs < mine or same_package, f"{path}:{line}: {module} (floor {name}) imports {target} ({their_name})"


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or through others: the sets of two and more in which each reaches each.

    By Tarjan's algorithm for strongly connected components.
    """
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        path.append(module)
        for imported in sorted(graph[module]):
            if imported not in number:
                visit(imported)
            if imported in path:
                lowest[module] = min(lowest[module], lowest[imported])
        if lowest[module] == number[module]:
            start = path.index(module)
            if len(path) - start > 1:
                found.append(sorted(path[start:]))
            del path[start:]

    for module in sorted(graph):
        if module not in number:
            visit(module)
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Inside of packages, too, where the floors say nothing.

    An import in a function or under TYPE_CHECKING counts: it keeps Python from failing, and not a reader from having to
    know both modules to understand one. The package's own `__init__` is left out, as it only offers what is below it.
    """
    graph = {
        dotted(path): {target for name, _ in imports(path) if (target := own(name)) and target != dotted(path)}
        for path in MODULES
        if dotted(path)
    }
    assert circles(graph) == []


def test_circles_are_found_wherever_the_import_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = {
        "a": "from distquant import b",
        "b": "def late():\n    from distquant.c import thing",
        "c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from distquant.a import thing",
        "d": "from distquant.a import thing",
    }
    for name, text in code.items():
        (tmp_path / f"{name}.py").write_text(text)
    paths = sorted(tmp_path.glob("*.py"))
    monkeypatch.setattr(sys.modules[__name__], "MODULES", paths)
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    graph = {dotted(path): {own(name) or "" for name, _ in imports(path)} - {""} for path in paths}
    assert graph == {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert circles(graph) == [["a", "b", "c"]]


def test_every_module_has_a_floor() -> None:
    for path in MODULES:
        if module := dotted(path):
            floor_of(module)
    listed = {name for names in FLOORS for name in names}
    there = {dotted(path) for path in MODULES}
    assert listed <= there, "a floor names a module that is gone"


def test_the_package_itself_names_only_what_it_offers() -> None:
    """`distquant/__init__.py` may name everything, but must load it lazily: see the test of a bare import."""
    eager = [
        node.module
        for node in ast.parse((PACKAGE / "__init__.py").read_text()).body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("distquant")
    ]
    assert set(eager) == {"distquant.errors", "distquant.version"}


ARITHMETIC = [
    *(PACKAGE / "sharding").glob("[!tr]*.py"),  # but the tally and the row layouts, which hold tensors
    *(PACKAGE / "planning" / f"{name}.py" for name in ("load_plan", "tensor_parallel", "expert_parallel", "slots")),
    PACKAGE / "planning" / "read_assignment.py",
]
"""Modules that decide by arithmetic alone, and run on a laptop."""


def test_arithmetic_and_kernels_never_see_each_other() -> None:
    for path in [*ARITHMETIC, *(PACKAGE / "kernels").rglob("*.py")]:
        other = ("kernels",) if path in ARITHMETIC else ("planning", "sharding")
        for imported, line in imports(path):
            assert (own(imported) or "").split(".")[0] not in other, f"{path}:{line}"


@pytest.mark.parametrize("folder", ["planning", "config", "checkpoint", "sharding"])
def test_what_decides_needs_no_torch_when_imported(folder: str) -> None:
    for path in (PACKAGE / folder).glob("*.py"):
        if dotted(path) in ("sharding.tally", "sharding.row_layout"):
            continue
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            heavy = {name.split(".")[0] for name in names} & {"torch", "transformers", "bitsandbytes", "accelerate"}
            assert not heavy, f"{path}:{node.lineno}"


def test_arithmetic_does_no_io_and_knows_no_torch() -> None:
    for path in ARITHMETIC:
        imported = {name.split(".")[0] for name, _ in imports(path)}
        assert not imported & {"torch", "transformers", "os", "pathlib", "io", "socket"}, path


def test_ray_is_imported_only_in_runtime_ray() -> None:
    where = {dotted(path) for path in MODULES for name, _ in imports(path) if name.split(".")[0] == "ray"}
    assert where == {"runtime.ray", "runtime.ray_model", "runtime.ray_watch", "runtime.gathering", "runtime.placement"}


def calls(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            function = node.func
            yield function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def test_process_groups_are_created_only_in_runtime() -> None:
    makers = {"init_process_group", "new_group", "new_subgroups", "init_device_mesh", "DeviceMesh", "TCPStore"}
    where = {dotted(path) for path in MODULES if makers & set(calls(path))}
    assert where == {"runtime.meeting", "runtime.process_group"}


def test_importing_distquant_imports_nothing_heavy() -> None:
    code = "import json, sys, distquant, distquant.cli.main; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert "distquant" in loaded
    assert not loaded & {"torch", "transformers", "ray", "bitsandbytes", "accelerate", "peft", "numpy", "safetensors"}


OPTIONAL = ("bitsandbytes", "ray", "peft", "deepspeed", "torchao")

PLAN_AND_LOAD = """
import distquant as dq
plan = dq.plan(MODEL, quantization_config="none", mesh="tp=2")
model = dq.load(MODEL, quantization_config="none")
print(len(plan.memory), sum(p.numel() for p in model.parameters()), dq.fingerprint(model))
"""


def test_without_any_optional_package_none_plans_and_loads(kjv_tiny: str, tmp_path: Path) -> None:
    import distquant as dq

    done = run_without(OPTIONAL, tmp_path / "packages", f"MODEL = {kjv_tiny!r}\n{PLAN_AND_LOAD}")
    assert done.returncode == 0, done.stderr
    ranks, parameters, fingerprint = done.stdout.split()
    here = dq.load(kjv_tiny, quantization_config="none")
    assert (int(ranks), int(parameters)) == (2, sum(p.numel() for p in here.parameters()))
    assert fingerprint == dq.fingerprint(here)


@pytest.mark.parametrize("package", OPTIONAL[:3])
def test_an_absent_package_is_really_absent(package: str, tmp_path: Path) -> None:
    code = f"import importlib.util as u; print(u.find_spec({package!r}), u.find_spec('torch') is not None)"
    assert run_without(OPTIONAL, tmp_path / "packages", code).stdout.split() == ["None", "True"]
