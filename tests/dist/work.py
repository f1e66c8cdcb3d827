"""What ranks do in these tests. Ranks are spawned processes, so all of it lives at module level.

Every function also works in the test's own process, where it is the unsharded truth to compare with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import distquant as dq

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

SCHEMES = ("none", "nf4", "nf4-dq", "fp4-dq", "int8")
IDS = ((5, 17, 99, 3, 42, 42, 8, 110, 64, 23, 7, 80), (90, 2, 31, 77, 12, 6, 55, 101, 9, 118, 4, 66))
"""Two prompts within every family's vocabulary."""


def bnb(name: str | None, compute: str = "float32", storage: str = "uint8") -> Any:
    """A short name as a config (None: the checkpoint's own), with everything of bitsandbytes that decides rounding spelled out."""
    if name is None or not name.startswith(("nf4", "fp4")):
        return name
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": name[:3],
        "bnb_4bit_use_double_quant": name.endswith("-dq"),
        "bnb_4bit_compute_dtype": compute,
        "bnb_4bit_quant_storage": storage,
    }


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def exact(path: str, name: str, mesh: str | None = None) -> Any:
    """A model whose arithmetic is float32 throughout."""
    return dq.load(path, quantization_config=bnb(name), mesh=mesh, dtype="float32")


def fingerprint(path: str, quant: Any, mesh: str | None = None, **kwargs: Any) -> str:
    return dq.fingerprint(dq.load(path, quantization_config=quant, mesh=mesh, **kwargs))


def fingerprint_of_rank(requests: list[tuple[str, str]], quant: Any, mesh: str) -> str:
    """Of what is loaded where every rank asks for a path and a dtype of its own."""
    path, dtype = requests[torch.distributed.get_rank()]
    return fingerprint(path, quant, mesh, dtype=dtype)


def logits(path: str, name: str, mesh: str | None = None) -> Tensor:
    with torch.no_grad():
        return exact(path, name, mesh)(torch.tensor(IDS)).logits


def logits_in_float8(path: str, name: str, mesh: str | None = None) -> Tensor:
    model = dq.load(path, quantization_config=name, mesh=mesh, dtype="float32", forward="float8")
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits


def config_after_load(path: str, mesh: str | None = None) -> dict[str, Any]:
    """The shared config after a load and a forward."""
    model = exact(path, "nf4", mesh)
    with torch.no_grad():
        model(torch.tensor(IDS))
    return {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}


def perplexity(path: str, name: str, text: str, mesh: str | None = None) -> float:
    from transformers import AutoTokenizer

    return dq.perplexity(exact(path, name, mesh), AutoTokenizer.from_pretrained(path), text)


def dequantized_weights(path: str, quant: Any, mesh: str | None = None) -> dict[str, Tensor]:
    """This rank's dequantized weights by module path."""
    return meant(dq.load(path, quantization_config=quant, mesh=mesh))


def meant(model: Any) -> dict[str, Tensor]:
    """Dequantized weights by module path, each as the library of its module has it."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    from distquant.quantization.linear.quantized_linear import QuantizedLinear
    from distquant.quantization.linear.unaligned_linear4bit import dequantized

    found = {}
    for name in model.distquant.plan.converted:
        module = model.get_submodule(name)
        if isinstance(module, Linear8bitLt):
            found[name] = module.weight.data.float() * module.weight.SCB.view(-1, 1) / 127
        elif isinstance(module, Linear4bit):
            found[name] = dequantized(module)
        elif isinstance(module, QuantizedLinear):
            found[name] = module.dequantized()
        else:  # hqq's module, torchao's and quanto's tensors know it themselves
            found[name] = (module if hasattr(module, "W_q") else module.weight).dequantize()
    return found


def tokens(path: str, name: str, mesh: str | None, seed: int | None = None, **kwargs: Any) -> list[list[int]]:
    """What `generate` answers; with a seed, ranks start from different random states on purpose."""
    model = exact(path, name, mesh)
    if seed is not None:
        torch.manual_seed(seed + rank())
    return model.generate(torch.tensor(IDS), max_new_tokens=6, **kwargs).tolist()


def traces_of_generate(path: str, quant: Any, mesh: str | None, static: bool) -> tuple[str, str, list[str]]:
    """Fingerprints before and after a generation, and the names of state that it changed."""
    model = dq.load(path, quantization_config=quant, mesh=mesh)
    before, state = dq.fingerprint(model), {k: v.clone() for k, v in model.state_dict().items()}
    more = {"cache_implementation": "static"} if static else {}
    model.generate(torch.tensor(IDS), max_new_tokens=3, do_sample=False, **more)
    after, now = dq.fingerprint(model), model.state_dict()
    changed = [
        k for k in state.keys() | now.keys() if k not in state or k not in now or not same_bits(state[k], now[k])
    ]
    return before, after, changed


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


# -- failures ----------------------------------------------------------------------------------------------------------


def error_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> BaseException | None:
    """What a function raises on this rank."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return error
    return None


def load_planned(plans: list[dq.LoadPlan]) -> Any:
    """Loads this rank's own plan."""
    return dq.load(plans[rank()])


def save_sharded(path: str, quant: Any, mesh: str, folder: str) -> None:
    dq.load(path, quantization_config=quant, mesh=mesh).save_pretrained(folder)


def fingerprint_staged(path: str, quant: Any, mesh: str, staging: str) -> str:
    return fingerprint(path, quant, mesh, staging=staging)


def logits_and_vocabulary(path: str, name: str, mesh: str) -> tuple[Tensor, int]:
    """Logits, and how many rows of the vocabulary this rank holds (embedding and head are one tensor)."""
    model = exact(path, name, mesh)
    weight = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is weight
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits, len(weight)


def tokens_as_stored(path: str, quant: Any, mesh: str, kwargs: dict[str, Any]) -> list[list[int]]:
    model = dq.load(path, quantization_config=quant, mesh=mesh)
    return model.generate(torch.tensor(IDS), max_new_tokens=6, **kwargs).tolist()


def bytes_read(path: str, quant: Any, mesh: str) -> int:
    return dq.load(path, quantization_config=quant, mesh=mesh).distquant.report.bytes_read


def tokens_with(path: str, name: str, mesh: str, seed: int | None, kwargs: dict[str, Any]) -> list[list[int]]:
    return tokens(path, name, mesh, seed, **kwargs)


def load_while_changing(plan: dq.LoadPlan, change: Callable[[str], None], moment: str) -> Any:
    """Loads; rank 0 changes the file when all ranks have compared its header, or when all have read it.

    Args:
        plan: of a checkpoint in one file.
        change: called with its path.
        moment: "open_planned", after which it happens, or "check_unchanged", before which.
    """
    from distquant.loading import loader

    step = getattr(loader, moment)

    def with_change(*args: Any) -> Any:
        result = step(*args) if moment == "open_planned" else None
        dist.barrier()
        if rank() == 0:
            change(f"{plan.model}/model.safetensors")
        dist.barrier()
        return result if moment == "open_planned" else step(*args)

    setattr(loader, moment, with_change)
    try:
        return dq.load(plan)
    finally:
        setattr(loader, moment, step)


def cut(path: str) -> None:
    import os

    os.truncate(path, 5000)


def overwrite_the_end(path: str) -> None:
    """Leaves the header and the size as they are."""
    with open(path, "r+b") as file:
        file.seek(-100, 2)
        file.write(bytes(100))


def fingerprint_after_error(path: str, quant: Any) -> str:
    assert isinstance(error_of(fingerprint, path, quant, "tp=3"), dq.InputError)
    return fingerprint(path, quant, "tp=2")


# -- reading -----------------------------------------------------------------------------------------------------------


def loaded(plan: dq.LoadPlan, kwargs: dict[str, Any] | None = None) -> tuple[str, Any]:
    """Fingerprint and this rank's report."""
    model = dq.load(plan, **(kwargs or {}))
    return dq.fingerprint(model), model.distquant.report


def engine_leftovers() -> list[str]:
    """Threads, open files and memory that a load must have given back (gloo's own are not looked at)."""
    import gc
    import os
    import threading
    from contextlib import suppress

    gc.collect()
    found = [thread.name for thread in threading.enumerate() if thread.name.startswith("distquant")]
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    with open("/proc/self/maps") as maps:
        found += [line for line in maps if "distquant-staging" in line]
    return [name for name in found if "distquant" in name or name.endswith(".safetensors")]


def load_with_a_fault(plan: dq.LoadPlan, victim: int, fault: BaseException) -> tuple[str, str, list[str]]:
    """Rank `victim` raises once half of its rows are there: kind and text of what each rank raises, what is left."""

    def progress(seen: Any) -> None:
        if rank() == victim and 2 * seen.done >= seen.total:
            raise type(fault)(*fault.args)  # not the object that is held here, with all frames that it passes

    raised = ("", "")
    try:
        dq.load(plan, progress=progress)
    except BaseException as error:
        raised = (type(error).__name__, str(error))
    return *raised, engine_leftovers()


def load_and_be_killed(plan: dq.LoadPlan, victim: int) -> tuple[str, str]:
    """Rank `victim` is killed, without a word, once half of its rows are there."""
    import os
    import signal

    def progress(seen: Any) -> None:
        if rank() == victim and 2 * seen.done >= seen.total:
            os.kill(os.getpid(), signal.SIGKILL)

    error = error_of(dq.load, plan, progress=progress)
    return type(error).__name__, str(error)
