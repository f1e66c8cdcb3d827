"""The options of `plan`, `load` and `ray.load`, each in one place.

The docstring under a field documents the option. Its first paragraph is also the help of the command line's flag
(`cli.flags`); the rest is for the Python API. The public functions repeat names, types, defaults and
documentation, for readers and type checkers; `tests/unit/test_options.py` holds them and the flags to this module.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from distquant.accelerator.names import runs_cuda_kernels
from distquant.errors import InputError, Problems
from distquant.kernels.choice import Kernel
from distquant.outputs import output_problem
from distquant.units import parse_bytes

if TYPE_CHECKING:
    import torch

    from distquant.sharding.mesh import Mesh

Model = str | os.PathLike[str]
"""Folder of a checkpoint, GGUF file, or id in the Hugging Face cache."""

ALL_REDUCE, ALL_TO_ALL = "all_reduce", "all_to_all"

DISPATCH = {
    ALL_REDUCE: "all ranks of ep hold the same tokens; each runs its own experts on them, and the results are summed",
    ALL_TO_ALL: "every rank of ep holds tokens of its own; they are sent to the ranks of their experts and back",
}
"""Routes of tokens to experts on other ranks of ep."""

IO_MODES = ("auto", "buffered", "direct", "mapped")
"""By measurement, through the page cache, past it, and not at all where a weight can be the file's own pages."""


class Forward(str, Enum):
    """Ways to multiply by a weight that is kept as its format stores it."""

    AUTO = "auto"
    """On a GPU in float8, where the method means activations to be float8, too, and by those of gptqmodel's kernels
    that leave the stored words as they are; else dequantized."""
    DEQUANTIZE = "dequantize"
    """The weight is dequantized, and multiplied with the activations as they are."""
    FLOAT8 = "float8"
    """In float8 on any device (on a CPU torch computes the same, slowly)."""
    GPTQMODEL = "gptqmodel"
    """By the fastest of gptqmodel's kernels for the layouts of GPTQ and AWQ; it may keep the stored words to itself."""

    def tries(self, way: Forward, device: torch.device) -> bool:
        """Returns True if this way is tried on a device: where it is asked for, and on a GPU by `AUTO`."""
        return self is way or (self is Forward.AUTO and runs_cuda_kernels(device))


FORWARDS = tuple(each.value for each in Forward)
KERNELS = tuple(each.value for each in Kernel)


class LoadProgress(NamedTuple):
    """The progress of one rank."""

    done: int = 0
    """Bytes of rows taken so far."""
    total: int = 0
    """Bytes of rows that this rank reads in all; 0 = not known yet."""
    limit: str = ""
    """The stage that holds it back."""


Progress = Callable[[LoadProgress], None]
"""Called as rows arrive."""


MOST_SECONDS = 10**9
"""Of a timeout: 31 years. Far longer ones overflow the system's clocks."""


DECLARED = ("ranks_per_node", "capability", "context", "batch")
"""Options of `plan` alone: facts about devices, which a load measures, and what is to be generated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """Options that a plan depends on, beside the model and the devices."""

    quantization_config: Any = None
    """Quantization: a short name (`nf4`, `nf4-dq`, `int8`, ...), a JSON file, or JSON text. Default: that of the
    checkpoint.

    Also a `transformers` config object, a dict, or a dataclass of `distquant.config`.
    """
    mesh: str | int | Mesh | None = None
    """Mesh of ranks, such as `tp=8` or `dp=2,tp=4`; a number alone is that of tp. Default: one rank."""
    device_map: str | Mapping[str, Any] | None = None
    """`auto`, a device, or a dict (JSON) of module to device, for one process with many devices; excludes a mesh."""
    max_memory: str | int | Mapping[Any, Any] | None = None
    """Bytes that each rank may fill, such as `24GiB`; with a device map also a dict (JSON) of device to size."""
    dtype: Any = "auto"
    """Dtype that weights are loaded in and quantized from: `bfloat16`, `float16`, `float32`, or `auto` (as stored)."""
    attn_implementation: str | None = None
    """Attention of the model, as in transformers: `eager`, `sdpa`, `flash_attention_2`, ... Default: transformers'
    choice."""
    staging: str | int = "512MiB"
    """Bytes that weights may pass through, per rank."""
    ranks_per_node: int | None = None
    """Ranks that share a node, and so read each byte once among them. Default: 8."""
    dispatch: str = ALL_REDUCE
    """Route of tokens to experts on other ranks of ep: `all_reduce` if these ranks hold the same tokens (as in
    `generate`), `all_to_all` if each holds a batch of its own."""
    on_unsupported: str = "error"
    """Treatment of a checkpoint whose quantization method is not supported: `error`, or `skip` to plan its tensors as
    they are stored.

    A plan made with `skip` is to be read only: `load` rejects it.
    """
    capability: tuple[int, int] | None = None
    """CUDA compute capability of the devices, if known."""
    context: int | None = None
    """Tokens of a sequence, prompt and answer together, that memory is planned for. Default: 4096, or the model's most
    if that is less."""
    batch: int = 1
    """Sequences that each replica generates at once, that memory is planned for."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""
    revision: str | None = None
    """Revision of a cached id."""
    cache_dir: str | os.PathLike[str] | None = None
    """Folder in which a cached id is looked up, in place of the Hugging Face cache."""

    def __post_init__(self) -> None:
        """Copies mappings, so that they are dicts of this object's own."""
        for name in ("device_map", "max_memory"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, dict(value))

    def rank_memory(self) -> int | None:
        """Returns the bytes per rank, if one valid size is given; `make_plan` reports an invalid one."""
        if self.max_memory is None or isinstance(self.max_memory, Mapping):
            return None
        try:
            return parse_bytes(self.max_memory, "max_memory")
        except InputError:
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Options that change the way a load runs, and no bit of the weights that it loads. A plan has none of them."""

    kernel: str = "auto"
    """Kernels that quantize: `auto`, `reference`, `cpu`, `triton` or `bitsandbytes`. All give the same bits."""
    forward: str = "auto"
    """Way to multiply by weights that are kept as their format stores them.

    `dequantize` multiplies by the dequantized weight. `float8` also rounds activations to float8, for methods that are
    meant so. `gptqmodel` takes its fastest kernel for the layouts of GPTQ and AWQ. That kernel may rearrange the stored
    words; such a model can be neither saved nor trained. `auto` takes, on a GPU, float8 or those kernels of gptqmodel
    that keep the stored words.
    """
    io: str = "auto"
    """Way to read files: `buffered` (through the page cache), `direct` (past it), `mapped` (on the CPU, weights that
    stay as stored are the file's own pages), or `auto` (cached files mapped if they are local, else read through the
    cache; the rest past it).

    Mapped files must not change as long as the model is used: see docs/streaming.md.
    """
    trace: str | os.PathLike[str] | None = None
    """File to write a trace of all ranks' stages to, for Perfetto."""
    timeout: float | None = None
    """Seconds that a rank waits for the others before it gives up."""
    interface: str | None = None
    """Network interface on which ranks listen, such as `eth0`. Default: loopback if all ranks are on one machine, else
    that which leads to rank 0."""
    adapter: str | os.PathLike[str] | bool | None = None
    """Saved PEFT adapter to apply once the model is loaded: its folder, or an id in the Hugging Face cache.

    `False` loads the model alone. One of the two must be given where an adapter is in the model's folder, because
    `transformers` would apply that one.
    """

    def __post_init__(self) -> None:
        """Raises `InputError` with every option that cannot work; which kernels there are depends on the device."""
        problems = Problems()
        for name, known in (("forward", FORWARDS), ("io", IO_MODES)):
            if getattr(self, name) not in known:
                problems.add(name, f"unknown value {getattr(self, name)!r}", f"Choose one of: {', '.join(known)}")
        if self.trace is not None:
            object.__setattr__(self, "trace", os.fspath(self.trace))
            if (problem := output_problem("trace", self.trace)) is not None:
                problems.extend([problem])
        if self.timeout is not None and not 0 < self.timeout <= MOST_SECONDS:
            fix = f"Give a number of seconds above 0, {MOST_SECONDS} at most"
            problems.add("timeout", f"invalid timeout {self.timeout}", fix)
        named = isinstance(self.adapter, (str, os.PathLike)) and os.fspath(self.adapter)
        if self.adapter is not None and self.adapter is not False and not named:
            problems.add("adapter", f"invalid adapter {self.adapter!r}", "Give its folder, or False for none")
        problems.raise_if_any()


class Aliases(TypedDict, total=False):
    """Other spellings of options, for people who know them from `transformers`, vLLM or torchrun.

    Attributes:
        tp: ranks over which every layer is divided: `tp=2` is `mesh="tp=2"`.
        dp: replicas of the model, likewise.
        ep: ranks over which experts are distributed, likewise.
        load_in_4bit: True is `quantization_config="nf4"`.
        load_in_8bit: True is `quantization_config="int8"`.
        torch_dtype: as `dtype`.
        device: one device, as `device_map`.
    """

    tp: int | None
    dp: int | None
    ep: int | None
    load_in_4bit: bool
    load_in_8bit: bool
    torch_dtype: Any
    device: Any


def select(kind: type[PlanOptions] | type[RunOptions], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of a function's arguments that are options of `kind`."""
    return {option.name: arguments[option.name] for option in fields(kind) if option.name in arguments}
