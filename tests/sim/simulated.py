"""The simulated accelerator of `sim.cpp`: builds it, once for each torch and source, and makes it torch's device `sim`.

Renaming PrivateUse1 holds for a whole process and cannot be undone, so tests use the device in a process of its own
(see `conftest.py`). Nothing here is imported by distquant, which reaches the device by torch's own words alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "sim"
LIBRARIES = ("torch", "torch_cpu", "torch_python", "c10")


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which(os.environ.get("CXX", "g++"))


def built() -> Path:
    """The compiled module, which takes about a minute where it is not there yet. Processes take turns."""
    import torch

    source = HERE / "sim.cpp"
    key = hashlib.sha256(source.read_bytes() + f"{torch.__version__} {torch.__file__}".encode())
    tag = sysconfig.get_config_var("SOABI") or "abi"
    target = BUILD / f"{key.hexdigest()[:16]}-{tag}" / "_sim.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile(source, target, Path(torch.__file__).parent)
    return target


def _compile(source: Path, target: Path, torch: Path) -> None:
    half = target.with_suffix(".half")
    folders = [torch / "include", torch / "include/torch/csrc/api/include", Path(sysconfig.get_paths()["include"])]
    command = [str(compiler()), "-O1", "-std=c++20", "-fPIC", "-shared", "-w"]
    command += ["-DTORCH_EXTENSION_NAME=_sim", "-DTORCH_API_INCLUDE_EXTENSION_H", *(f"-I{each}" for each in folders)]
    command += [str(source), "-o", str(half), f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}"]
    done = subprocess.run([*command, *(f"-l{each}" for each in LIBRARIES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    os.replace(half, target)


class _Cudart:
    """As much of CUDA's runtime as registers host memory."""

    def __init__(self, sim: Any):
        self._sim = sim

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        return self._sim.host_register(address, nbytes)

    def cudaHostUnregister(self, address: int) -> int:
        return self._sim.host_unregister(address)


def register(library: Path) -> Any:
    """Makes `sim` a device of this process' torch; returns the controls (see the end of `sim.cpp`)."""
    import torch

    spec = importlib.util.spec_from_file_location("_sim", library)
    assert spec is not None and spec.loader is not None
    sim = importlib.util.module_from_spec(spec)
    sys.modules["_sim"] = sim
    spec.loader.exec_module(sim)
    torch.utils.rename_privateuse1_backend("sim")
    torch._register_device_module("sim", _device_module(torch, sim))
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return sim


def _device_module(torch: Any, sim: Any) -> types.ModuleType:
    """`torch.sim`: what torch asks of the module of any device, and the runtime by which memory is registered."""
    accelerator, module, runtime = torch.accelerator, types.ModuleType("torch.sim"), _Cudart(sim)
    module.__dict__.update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        _lazy_init=lambda: None,
        _is_in_bad_fork=lambda: False,
        device_count=sim.device_count,
        current_device=sim.current_device,
        set_device=accelerator.set_device_index,
        synchronize=accelerator.synchronize,
        current_stream=accelerator.current_stream,
        Stream=torch.Stream,
        Event=torch.Event,
        manual_seed_all=lambda seed: None,
        get_rng_state=lambda device="sim": torch.get_rng_state(),
        set_rng_state=lambda state, device="sim": None,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        empty_cache=lambda: None,
        mem_get_info=lambda device=None: accelerator.get_memory_info(device),
        max_memory_allocated=lambda device=None: sim.memory()[1].get(torch.device(device or "sim:0").index, 0),
        get_device_properties=lambda device=0: types.SimpleNamespace(total_memory=80 << 30, uuid=f"SIM-{device}"),
        cudart=lambda: runtime,
    )
    return module
