"""The two entry points: `plan` decides, `load` does. Everything that the command line does is a call of these."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distquant.environment import Environment
from distquant.errors import InputError
from distquant.options import Model, PlanOptions, Progress, RunOptions, select
from distquant.planning import LoadPlan
from distquant.planning.planner import make_plan
from distquant.planning.request import Request
from distquant.quiet import quiet_imports
from distquant.sharding.mesh import Mesh

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plan(
    model: Model,
    *,
    quantization_config: Any = None,
    mesh: str | Mesh | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: str | int | Mapping[Any, Any] | None = None,
    dtype: Any = "auto",
    staging: str | int = "512MiB",
    ranks_per_node: int | None = None,
    dispatch: str = "all_reduce",
    on_unsupported: str = "error",
    capability: tuple[int, int] | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> LoadPlan:
    """Decides how a checkpoint would be loaded. Reads configs and headers only; needs no device.

    Args:
        model: Folder of a safetensors checkpoint, a GGUF file, or the id of a model in the Hugging Face cache.
        quantization_config: Quantization: a short name (`nf4-dq`, `int8`, ...), a JSON file, or JSON text. Default:
            that of the checkpoint. Also a `transformers` config object, a dict, or a dataclass of `distquant.config`.
        mesh: Mesh of ranks, such as `tp=8` or `dp=2,tp=4`. Default: one rank.
        device_map: `auto`, a device, or a dict (JSON) of module to device, for one process with many devices; excludes
            a mesh.
        max_memory: Bytes that each rank may fill, such as `24GiB`; with a device map also a dict (JSON) of device to
            size.
        dtype: Dtype that weights are loaded in and quantized from: `bfloat16`, `float16`, `float32`, or `auto` (as
            stored).
        staging: Bytes that weights may pass through, per rank.
        ranks_per_node: Ranks that share a node, and so read each byte once among them. Default: 8.
        dispatch: Route of tokens to experts on other ranks of ep: `all_reduce` if these ranks hold the same tokens (as
            in `generate`), `all_to_all` if each holds a batch of its own.
        on_unsupported: Treatment of a checkpoint whose quantization method is not supported: `error`, or `skip` to plan
            its tensors as they are stored. A plan made with `skip` is to be read only: `load` rejects it.
        capability: CUDA compute capability of the devices, if known.
        trust_remote_code: Run model code that comes with the checkpoint.
        revision: Revision of a cached id.

    Raises:
        InputError: with every problem that can be known from configs and headers.
    """
    arguments = locals()
    quiet_imports()
    from distquant.runtime.measure import declared

    request = Request(model=model, **select(PlanOptions, arguments))
    return make_plan(request, declared(request))


def load(
    model: Model | LoadPlan,
    *,
    quantization_config: Any = None,
    mesh: str | Mesh | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: str | int | Mapping[Any, Any] | None = None,
    dtype: Any = "auto",
    staging: str | int = "512MiB",
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
) -> PreTrainedModel:
    """Loads a model: all of it in one process, or this rank's part under torchrun and its like.

    Arguments up to `revision` are those of `plan`; `model` may also be a finished `LoadPlan`, and then stands alone.

    Args:
        kernel: Kernels that quantize: `auto`, `reference`, `cpu`, `triton` or `bitsandbytes`. All give the same bits.
        forward: Way to multiply by weights that are kept as their format stores them. `dequantize` multiplies by the
            dequantized weight. `float8` also rounds activations to float8, for methods that are meant so. `gptqmodel`
            takes its fastest kernel for the layouts of GPTQ and AWQ. That kernel may rearrange the stored words; such a
            model can be neither saved nor trained. `auto` takes, on a GPU, float8 or those kernels of gptqmodel that
            keep the stored words.
        io: Way to read files: `buffered` (through the page cache), `direct` (past it), or `auto` (cached pages through
            it, the rest past it).
        trace: File to write a trace of all ranks' stages to, for Perfetto.
        timeout: Seconds that a rank waits for the others before it gives up.
        progress: Called with `LoadProgress` (bytes taken, bytes in all, stage that limits) as rows arrive.

    Returns:
        A `transformers.PreTrainedModel` in eval mode whose quantized modules are the ecosystem's own, of local size.
        `model.distquant` carries the plan, the ranks and this rank's report.

    Raises:
        InputError: with every problem, before a weight byte is read.
    """
    arguments = locals()
    quiet_imports()
    from distquant.runtime import local, torchrun

    if isinstance(model, LoadPlan):
        request: Request | LoadPlan = model
        size = model.mesh.size
    else:
        request = Request(model=model, **select(PlanOptions, arguments))
        size = _mesh_size(request)
    options = RunOptions(**select(RunOptions, arguments))
    if torchrun.joined():
        return torchrun.load(request, options, progress)
    if size > 1:
        fault = f"needs {size} ranks, and this process is alone"
        fix = "Start it with torchrun, or use distquant.ray.load (command line: --runtime torchrun or ray)"
        raise InputError.one("mesh", fault, fix)
    return local.load(request, options, progress)


def fingerprint(model: Any, *, quantized_only: bool = False) -> str:
    """Returns 32 hex digits that name the loaded weights, however many ranks hold them. All ranks must call it.

    Args:
        model: as `load` returned it.
        quantized_only: True to count quantized weights alone. Their digits do not depend on transformers' version,
            which decides the dtype of some others.
    """
    from distquant.verification.fingerprint import fingerprint as of

    return of(model, quantized_only=quantized_only)


def _mesh_size(request: Request) -> int:
    try:
        return Mesh.parse(request.mesh).size
    except InputError:
        make_plan(request, Environment())  # raises this and every other problem
        raise
