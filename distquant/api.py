"""The two entry points: `plan` decides, `load` does. Everything that the command line does is a call of these."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from distquant.environment import Environment
from distquant.errors import InputError
from distquant.options import Options, Progress
from distquant.planning import LoadPlan
from distquant.planning.planner import make_plan
from distquant.planning.request import DEFAULT_STAGING, Request
from distquant.sharding.mesh import Mesh
from distquant.units import parse_bytes

Model = str | os.PathLike[str]


def plan(
    model: Model,
    *,
    quantization_config: Any = None,
    mesh: str | Mesh | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: str | int | Mapping[Any, Any] | None = None,
    dtype: Any = "auto",
    staging: str | int = DEFAULT_STAGING,
    ranks_per_node: int | None = None,
    dispatch: str = "all_reduce",
    on_unsupported: str = "error",
    capability: tuple[int, int] | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> LoadPlan:
    """Decides how a checkpoint would be loaded. Reads configs and headers only; needs no device.

    Args:
        model: folder of a safetensors checkpoint, or the id of one in the Hugging Face cache.
        quantization_config: a `transformers` config object, a dict, a JSON file, one of our dataclasses, or a short
            name (`nf4-dq`, `int8`, ...). None: what the checkpoint says.
        mesh: `tp=8`, `dp=2,tp=4`; None is one rank.
        device_map: "auto" or a dict, for one process with many devices; excludes a mesh.
        max_memory: bytes that each rank may fill (`24GiB`); a dict of device -> size with a device map.
        dtype: what weights are loaded in and quantized from; "auto" takes the checkpoint's.
        staging: bytes that weights may pass through, per rank.
        ranks_per_node: ranks that share a node, and so read each byte once among them; None: 8.
        dispatch: how tokens reach experts on other ranks of ep: "all_reduce" where all of them are given the same
            tokens (as by `generate`), "all_to_all" where each is given a batch of its own.
        on_unsupported: what to do with a checkpoint that is quantized by a method without a scheme here: "error", or
            "skip" to leave the method out and plan its tensors as they are stored. Such a plan is to be read; `load`
            refuses it.
        capability: CUDA compute capability of the devices, if known.
        trust_remote_code: run model code that comes with the checkpoint.
        revision: which revision of a cached id.

    Raises:
        InputError: with every problem that can be known from configs and headers.
    """
    from distquant.runtime.measure import packages

    request = Request(
        model=model,
        quantization_config=quantization_config,
        mesh=mesh,
        device_map=dict(device_map) if isinstance(device_map, Mapping) else device_map,
        max_memory=dict(max_memory) if isinstance(max_memory, Mapping) else max_memory,
        dtype=dtype,
        staging=staging,
        ranks_per_node=ranks_per_node,
        dispatch=dispatch,
        on_unsupported=on_unsupported,
        trust_remote_code=trust_remote_code,
        revision=revision,
    )
    memory = _rank_memory(max_memory)
    environment = Environment(
        capability=capability,
        memory=memory,
        memory_source="max_memory" if memory is not None else "unknown",
        packages=packages(),
    )
    return make_plan(request, environment)


def load(
    model: Model | LoadPlan,
    *,
    quantization_config: Any = None,
    mesh: str | Mesh | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: str | int | Mapping[Any, Any] | None = None,
    dtype: Any = "auto",
    staging: str | int = DEFAULT_STAGING,
    dispatch: str = "all_reduce",
    on_unsupported: str = "error",
    trust_remote_code: bool = False,
    revision: str | None = None,
    kernel: str = "auto",
    forward: str = "auto",
    io: str = "auto",
    trace: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
    progress: Progress | None = None,
) -> Any:
    """Loads a model: all of it in one process, or this rank's part under torchrun and its like.

    Arguments are those of `plan`; `model` may also be a finished `LoadPlan`, and then stands alone.

    Args:
        kernel: which kernels quantize: `auto`, `reference`, `cpu`, `triton` or `bitsandbytes`. All give the same bits.
        forward: how weights are multiplied that are kept as their format stores them: `dequantize`, `float8` (with
            activations rounded to float8, where the method is meant so), `gptqmodel` (by its fastest kernel for GPTQ's
            and AWQ's layouts, which may rearrange the words: no saving then, and no training), or `auto`: on a GPU in
            float8, or by those of gptqmodel's kernels that leave the words alone.
        io: how files are read: `buffered` (through the page cache), `direct` (past it), or `auto`: what is in memory
            through the page cache, the rest past it.
        trace: file to write a trace of all ranks' stages to, for Perfetto.
        timeout: seconds that a rank waits for the others before it gives up.
        progress: called with `LoadProgress` (bytes taken, bytes in all, stage that limits) as rows arrive.

    Returns:
        A `transformers.PreTrainedModel` in eval mode whose quantized modules are the ecosystem's own, of local size.
        `model.distquant` carries the plan, the ranks and this rank's report.

    Raises:
        InputError: with every problem, before a weight byte is read.
    """
    from distquant.runtime import local, torchrun

    if isinstance(model, LoadPlan):
        request: Request | LoadPlan = model
        size = model.mesh.size
    else:
        request = Request(
            model=model,
            quantization_config=quantization_config,
            mesh=mesh,
            device_map=dict(device_map) if isinstance(device_map, Mapping) else device_map,
            max_memory=dict(max_memory) if isinstance(max_memory, Mapping) else max_memory,
            dtype=dtype,
            staging=staging,
            dispatch=dispatch,
            on_unsupported=on_unsupported,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
        size = _mesh_size(request)
    written = None if trace is None else os.fspath(trace)
    options = Options(kernel=kernel, forward=forward, io=io, trace=written, timeout=timeout)
    if torchrun.joined():
        return torchrun.load(request, _rank_memory(max_memory), options, progress)
    if size > 1:
        what = f"needs {size} ranks, and this process is alone"
        fix = "Start it with torchrun, or use distquant.ray.load (command line: --runtime torchrun or ray)"
        raise InputError.one("mesh", what, fix)
    return local.load(request, _rank_memory(max_memory), options, progress)


def fingerprint(model: Any) -> str:
    """32 hex digits that name the quantized weights, however many ranks hold them. All ranks must call it."""
    from distquant.verification.fingerprint import fingerprint as of

    return of(model)


def _mesh_size(request: Request) -> int:
    try:
        return Mesh.parse(request.mesh).size
    except InputError:
        make_plan(request, Environment())  # tells this and whatever else is wrong
        raise


def _rank_memory(max_memory: Any) -> int | None:
    """Bytes per rank where they are given; what is no size is told by `make_plan`, with all other problems."""
    if max_memory is None or isinstance(max_memory, Mapping):
        return None
    try:
        return parse_bytes(max_memory, "max_memory")
    except InputError:
        return None
