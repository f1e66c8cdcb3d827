"""The entry points: `plan` decides, `load` does. Everything that the command line does is a call of these.

Arguments are read and checked before torch is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distquant.environment import is_rank
from distquant.errors import InputError
from distquant.interpreter_end import left_before_the_end
from distquant.options import Aliases, Model, Progress, RunOptions, select
from distquant.planning import LoadPlan
from distquant.planning.arguments import read_arguments
from distquant.planning.request import Request
from distquant.progress import first_rank, showing
from distquant.quiet import quiet_imports
from distquant.sharding.mesh import Mesh

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Unpack


@left_before_the_end()
def plan(
    model: Model,
    quantization_config: Any = None,
    *,
    mesh: str | int | Mesh | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: str | int | Mapping[Any, Any] | None = None,
    dtype: Any = "auto",
    attn_implementation: str | None = None,
    staging: str | int = "512MiB",
    ranks_per_node: int | None = None,
    dispatch: str = "all_reduce",
    on_unsupported: str = "error",
    capability: tuple[int, int] | None = None,
    context: int | None = None,
    batch: int = 1,
    trust_remote_code: bool = False,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **aliases: Unpack[Aliases],
) -> LoadPlan:
    """Decides how a checkpoint would be loaded. Reads configs and headers only; needs no device.

    Args:
        model: Folder of a safetensors checkpoint, a GGUF file, or the id of a model in the Hugging Face cache.
        quantization_config: Quantization: a short name (`nf4`, `nf4-dq`, `int8`, ...), a JSON file, or JSON text.
            Default: that of the checkpoint. Also a `transformers` config object, a dict, or a dataclass of
            `distquant.config`.
        mesh: Mesh of ranks, such as `tp=8` or `dp=2,tp=4`; a number alone is that of tp. Default: one rank.
        device_map: `auto`, a device, or a dict (JSON) of module to device, for one process with many devices; excludes
            a mesh.
        max_memory: Bytes that each rank may fill, such as `24GiB`; with a device map also a dict (JSON) of device to
            size.
        dtype: Dtype that weights are loaded in and quantized from: `bfloat16`, `float16`, `float32`, or `auto` (as
            stored).
        attn_implementation: Attention of the model, as in transformers: `eager`, `sdpa`, `flash_attention_2`, ...
            Default: transformers' choice.
        staging: Bytes that weights may pass through, per rank.
        ranks_per_node: Ranks that share a node, and so read each byte once among them. Default: 8.
        dispatch: Route of tokens to experts on other ranks of ep: `all_reduce` if these ranks hold the same tokens (as
            in `generate`), `all_to_all` if each holds a batch of its own.
        on_unsupported: Treatment of a checkpoint whose quantization method is not supported: `error`, or `skip` to plan
            its tensors as they are stored. A plan made with `skip` is to be read only: `load` rejects it.
        capability: CUDA compute capability of the devices, if known.
        context: Tokens of a sequence, prompt and answer together, that memory is planned for. Default: 4096, or the
            model's most if that is less.
        batch: Sequences that each replica generates at once, that memory is planned for.
        trust_remote_code: Run model code that comes with the checkpoint.
        revision: Revision of a cached id.
        cache_dir: Folder in which a cached id is looked up, in place of the Hugging Face cache.
        aliases: Other spellings: `tp=2`, `dp=`, `ep=` in place of a mesh, `load_in_4bit=True` (nf4),
            `load_in_8bit=True` (int8), `torch_dtype=`, `device=`.

    Returns:
        The plan. Printed, it says in three lines if it fits; `fits` and `memory_for` answer for other contexts.

    Raises:
        InputError: with every problem that can be known from configs and headers.
    """
    request, _ = read_arguments("plan", locals(), runs=False)
    quiet_imports()
    from distquant.planning.planner import make_plan
    from distquant.runtime.measure import declared

    return make_plan(request, declared(request))


@left_before_the_end()
def load(
    model: Model | LoadPlan,
    quantization_config: Any = None,
    *,
    mesh: str | int | Mesh | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: str | int | Mapping[Any, Any] | None = None,
    dtype: Any = "auto",
    attn_implementation: str | None = None,
    staging: str | int = "512MiB",
    dispatch: str = "all_reduce",
    on_unsupported: str = "error",
    trust_remote_code: bool = False,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    kernel: str = "auto",
    forward: str = "auto",
    io: str = "auto",
    trace: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
    interface: str | None = None,
    adapter: str | os.PathLike[str] | bool | None = None,
    progress: Progress | bool | None = None,
    **aliases: Unpack[Aliases],
) -> PreTrainedModel:
    """Loads a model: all of it in one process, or this rank's part under torchrun and its like.

    Arguments up to `cache_dir`, and `aliases`, are those of `plan`; `model` may also be a finished `LoadPlan`, and then
    stands alone.

    Args:
        kernel: Kernels that quantize: `auto`, `reference`, `cpu`, `triton` or `bitsandbytes`. All give the same bits.
        forward: Way to multiply by weights that are kept as their format stores them. `dequantize` multiplies by the
            dequantized weight. `float8` also rounds activations to float8, for methods that are meant so. `gptqmodel`
            takes its fastest kernel for the layouts of GPTQ and AWQ. That kernel may rearrange the stored words; such a
            model can be neither saved nor trained. `auto` takes, on a GPU, float8 or those kernels of gptqmodel that
            keep the stored words.
        io: Way to read files: `buffered` (through the page cache), `direct` (past it), `mapped` (on the CPU, weights
            that stay as stored are the file's own pages), or `auto` (cached files mapped if they are local, else read
            through the cache; the rest past it). Mapped files must not change as long as the model is used: see
            docs/streaming.md.
        trace: File to write a trace of all ranks' stages to, for Perfetto.
        timeout: Seconds that a rank waits for the others before it gives up.
        interface: Network interface on which ranks listen, such as `eth0`. Default: loopback if all ranks are on one
            machine, else that which leads to rank 0.
        adapter: Saved PEFT adapter to apply once the model is loaded: its folder, or an id in the Hugging Face cache.
            `False` loads the model alone. One of the two must be given where an adapter is in the model's folder,
            because `transformers` would apply that one.
        progress: False shows nothing, True shows progress on standard error. Default: only if that is a terminal, or
            this is a notebook. A function is called instead, with this rank's `LoadProgress` (bytes taken, bytes in
            all, stage that limits), as rows arrive.

    Returns:
        A `transformers.PreTrainedModel` in eval mode whose quantized modules are the ecosystem's own, of local size.
        `model.distquant` carries the plan, the ranks and this rank's report.

    Raises:
        InputError: with every problem, before a weight byte is read.
    """
    arguments = locals()
    request: Request | LoadPlan
    if isinstance(model, LoadPlan):
        request, options = model, RunOptions(**select(RunOptions, arguments))
        size = model.mesh.size
    else:
        request, options = read_arguments("load", arguments)
        size = Mesh.parse(request.mesh).size
    joined = _joined()
    if size > 1 and not joined:
        fault = f"needs {size} ranks, and this process is alone"
        fix = "Start it with torchrun, or use distquant.ray.load (command line: --runtime torchrun or ray)"
        raise InputError.one("mesh", fault, fix)
    quiet_imports()
    called = progress if callable(progress) else None
    with showing(progress, here=first_rank()) as viewer:
        from distquant.runtime import local, torchrun

        if joined:
            return torchrun.load(request, options, called, viewer)
        return local.load(request, options, called, viewer)


from_pretrained = load
"""`load`, under the name that `transformers` has for it."""


def fingerprint(model: Any, *, quantized_only: bool = False) -> str:
    """Returns 32 hex digits that name the loaded weights, however many ranks hold them. All ranks must call it.

    Args:
        model: as `load` returned it.
        quantized_only: True to count quantized weights alone. Their digits do not depend on transformers' version,
            which decides the dtype of some others.

    Raises:
        InputError: the model was not loaded by distquant.
    """
    from distquant.verification.fingerprint import fingerprint as of

    return of(model, quantized_only=quantized_only)


def _joined() -> bool:
    """Returns True if this process is one of several ranks, or will be once the process group exists."""
    distributed = sys.modules.get("torch.distributed")  # torch is not imported only to ask
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return True
    return is_rank()
