"""The work of each contestant of `load.py` in its measured processes.

A system is a function of a checkpoint's folder, a contestant and a rank. It prepares everything that may be done before
the clock starts, and returns the call that is timed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from checkpoints import CHUNK, copier, reader, tensors, total_bytes
from common import memory
from contestants import Contestant, Measured, Run

QUANTIZED_AT_ONCE = (1024, 2048)
"""Rows and columns that a floor quantizes again and again: 4 MiB of bfloat16, which fit in the cache."""


def distquant(path: str, contestant: Contestant, rank: int) -> Run:
    import distquant as dq

    given = {"staging": contestant.staging, "io": contestant.io}
    options: dict[str, Any] = {name: value for name, value in given.items() if value}
    mesh = contestant.mesh or f"tp={contestant.ranks}"
    sizes = {name: nbytes for name, (_, nbytes) in tensors(path).items()}

    def run() -> Measured:
        model = dq.load(path, quantization_config=contestant.quant or None, mesh=mesh, dtype="bfloat16", **options)
        if contestant.quant in ("none", ""):
            touch(model)
        plan, report = model.distquant.plan, model.distquant.report
        sources = {source.tensor for tensor in plan.tensors for source in tensor.sources}
        return Measured(
            own=own_memory(),
            read=report.bytes_read,
            direct=report.direct_bytes,
            needed=sum(sizes[name] for name in sources),
            finished=report.quantized_bytes + report.unquantized_bytes,
            quantized=report.quantized_bytes,
            planned=plan.memory[rank].quantized,
            held=held(model),
            staging=plan.staging,
        )

    return run


def transformers(path: str, contestant: Contestant, rank: int) -> Run:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if contestant.ranks > 1:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(tp_size=contestant.ranks)
    else:
        options["device_map"] = "cpu"
    if contestant.quant == "nf4-dq":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    elif contestant.quant == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)

    def run() -> Measured:
        model = AutoModelForCausalLM.from_pretrained(path, **options)
        if contestant.quant == "none":
            touch(model)
        return Measured(own=own_memory(), held=held(model))

    return run


def recorded(path: str, contestant: Contestant, rank: int) -> Run:
    """distquant again, with a record of every read of a file."""
    from reads import recording

    return recording(path, contestant, rank, distquant(path, contestant, rank))


def upstream(path: str, contestant: Contestant, rank: int) -> Run:
    """The method's own library, see `peers`."""
    from peers import PEERS

    load = PEERS[contestant.peer].load

    def run() -> Measured:
        model = load(path)
        if not contestant.quant:
            touch(model)
        return Measured(own=own_memory())

    return run


def floor(path: str, contestant: Contestant, rank: int) -> Run:
    """The minimum for any loader: this rank's half of the reads and of the arithmetic, and its shard's fresh memory."""
    import distquant as dq

    plan = dq.plan(path, quantization_config=contestant.quant, mesh=f"tp={contestant.ranks}", dtype="bfloat16")
    read = reader(path, 1, part=slice(rank, None, contestant.ranks))
    parameters = sum(math.prod(tensor.shape) for tensor in plan.tensors if tensor.scheme != "none")
    quantize = quantizer(contestant.quant, parameters // contestant.ranks)
    sizes = shard_sizes(plan, rank)

    def run() -> Measured:
        start = time.perf_counter()
        count = read()
        after_read = time.perf_counter()
        quantize()
        after_quantize = time.perf_counter()
        write_fresh(sizes)
        end = time.perf_counter()
        parts = {"read": after_read - start, "quantize": after_quantize - after_read, "write": end - after_quantize}
        return Measured(read=count, finished=sum(sizes), parts=parts)

    return run


def quantizer(quant: str, parameters: int) -> Callable[[], None]:
    """Returns a call that quantizes so many parameters, from a warm buffer into warm outputs."""
    import torch

    from distquant.kernels import cpu

    rows, columns = QUANTIZED_AT_ONCE
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    if quant == "nf4-dq":
        codes, absmax = cpu.quantize_4bit(weight, 64, "nf4")

        def some(count: int) -> None:
            n = count * columns
            cpu.quantize_4bit(weight[:count], 64, "nf4", codes=codes[: n // 2], absmax=absmax[: n // 64])
    elif quant == "int8":
        codes, absmax = cpu.quantize_int8_rows(weight)

        def some(count: int) -> None:
            cpu.quantize_int8_rows(weight[:count], codes=codes[:count], absmax=absmax[:count])
    else:
        return lambda: None

    def run() -> None:
        full, rest = divmod(parameters // columns, rows)
        for _ in range(full):
            some(rows)
        if rest:
            some(rest)

    return run


def shard_sizes(plan: Any, rank: int) -> list[int]:
    """Returns bytes of each tensor of a rank's finished shard: the plan's sums, divided as the full tensors are."""
    shard, sizes = plan.memory[rank], []
    for quantized, nbytes in ((True, shard.quantized), (False, shard.unquantized)):
        counts = [math.prod(tensor.shape) for tensor in plan.tensors if (tensor.scheme != "none") is quantized]
        sizes += [count * nbytes // sum(counts) for count in counts]
    return sizes


def write_fresh(sizes: list[int]) -> None:
    import torch

    kept = [torch.empty(size, dtype=torch.uint8).fill_(1) for size in sizes]
    del kept


def fresh_memory(path: str, contestant: Contestant, rank: int) -> Run:
    """Writes this rank's share of the files' bytes once to new memory, in parts as large as weights."""
    sizes = [2 * CHUNK] * (total_bytes(path) // contestant.ranks // (2 * CHUNK))

    def run() -> Measured:
        write_fresh(sizes)
        return Measured()

    return run


def read_files(path: str, contestant: Contestant, rank: int) -> Run:
    """Reads all bytes of all files into one small buffer a thread, and drops them."""
    read = reader(path, contestant.threads, direct=contestant.cold)

    def run() -> Measured:
        count = read()
        return Measured(read=count, direct=count * contestant.cold)

    return run


def copy_files(path: str, contestant: Contestant, rank: int) -> Run:
    """Reads all bytes of all files into new memory and touches them: the minimum for a loader without mapped files."""
    import torch

    copy = copier(path, contestant.threads)

    def run() -> Measured:
        kept = copy()
        for part in kept:
            add_up(torch.frombuffer(part, dtype=torch.uint8))
        return Measured(own=own_memory())

    return run


SYSTEMS: dict[str, Callable[[str, Contestant, int], Run]] = {
    "distquant": distquant,
    "recorded": recorded,
    "transformers": transformers,
    "upstream": upstream,
    "floor": floor,
    "read": read_files,
    "copy": copy_files,
    "fresh": fresh_memory,
}


def own_memory() -> int:
    """Counts the bytes of this process outside mapped files."""
    return memory("RssAnon") + memory("RssShmem")


def touch(model: Any) -> None:
    """Reads every byte of the weights once, so that mapped pages are really in memory.

    Only for loads of stored weights (bf16, pre-quantized). A weight quantized on the way has been written already, and
    the peer's unquantized rest is left to it.
    """
    import torch

    for tensor in (*model.parameters(), *model.buffers()):
        for plain in plain_tensors(tensor):
            add_up(plain.reshape(-1).view(torch.uint8))


def add_up(data: Any) -> None:
    """Reads all bytes (uint8, flat) except the last few."""
    import torch

    data[: data.numel() // 8 * 8].view(torch.int64).sum()


def held(model: Any) -> int:
    """Counts the bytes of a model's tensors and of bitsandbytes' states beside them; shared memory counts once."""
    nbytes_at = {}
    for tensor in (*model.parameters(), *model.buffers()):
        state = getattr(tensor, "quant_state", None)
        inner = [value for each in (state, getattr(state, "state2", None)) if each for value in vars(each).values()]
        for plain in (*plain_tensors(tensor), *inner):
            if hasattr(plain, "data_ptr"):
                nbytes_at[plain.data_ptr()] = plain.nbytes
    return sum(nbytes_at.values())


def plain_tensors(tensor: Any) -> Iterator[Any]:
    """Yields the tensor, or those inside a tensor subclass (a shard, torchao's, quanto's)."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor.data
        return
    for name in tensor.__tensor_flatten__()[0]:
        inner = getattr(tensor, name)
        if hasattr(inner, "data_ptr"):  # a shard also names its mesh
            yield from plain_tensors(inner)
