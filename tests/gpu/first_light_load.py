"""What the steps of `first_light.py` load, copy and compare."""

from __future__ import annotations

import json
import math
import mmap
import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from first_light_steps import Run

PATIENCE = 50.0
"""Seconds that two ranks may take together."""
SLOWER = 4
"""Times that a dry run may take: on a machine without a GPU, and perhaps a busy one."""
CLOSE = 0.1
"""Largest relative difference of logits from the CPU's: methods that quantize activations reach some hundredths."""


def device_of(dry: bool) -> torch.device | None:
    """Returns the device of the run: this machine's accelerator, or the simulated one."""
    if dry:
        sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "sim"))
        import simulated

        simulated.register(simulated.built())
    from distquant.accelerator.facts import own_device

    device = own_device()
    return None if device.type == "cpu" else device


def copy_rate(device: torch.device, size: int, pinned: bool) -> float:
    """Returns bytes a second from memory like a load buffer's; the best of five."""
    from distquant.accelerator.host_memory import HostRegistration

    area = mmap.mmap(-1, size)
    memory = torch.frombuffer(area, dtype=torch.uint8)
    memory.fill_(1)
    registration = HostRegistration(memory, device) if pinned else None
    target = torch.empty(size, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(5):
        torch.accelerator.synchronize(device)
        start = time.perf_counter()
        target.copy_(memory, non_blocking=pinned)
        torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - start)
    if registration is not None:
        registration.release()
    return size / min(seconds)


def write_checkpoint(folder: Path, gigabytes: float, device: torch.device, dry: bool) -> tuple[Path, int]:
    """Writes a Llama of about so many bytes in bfloat16, two layers to a file; returns the folder and the bytes."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    hidden, inner, vocab = (64, 192, 512) if dry else (4096, 14336, 32000)
    heads, kv = (4, 2) if dry else (32, 8)
    width = hidden // heads
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv * width, hidden),
        "self_attn.v_proj": (kv * width, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    ends = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    ends["model.norm.weight"] = (hidden,)
    of_a_layer = 2 * sum(map(math.prod, shapes.values()))
    layers = 2 if dry else max(int((gigabytes * 1e9 - 4 * vocab * hidden) / of_a_layer), 1)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocab, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    places: dict[str, str] = {}
    size = 0

    def files() -> Iterator[dict[str, tuple[int, ...]]]:
        yield ends
        for first in range(0, layers, 2):
            both = range(first, min(first + 2, layers))
            yield {f"model.layers.{n}.{name}.weight": shape for n in both for name, shape in shapes.items()}

    for number, wanted in enumerate(files()):
        name = f"model-{number:05d}.safetensors"
        values = {key: _values(shape, device) for key, shape in wanted.items()}
        save_file(values, folder / name, {"format": "pt"})
        places |= dict.fromkeys(values, name)
        size += sum(value.nbytes for value in values.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder, size


def _values(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns values of a usual scale, drawn on the device; norms are ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, device=device).mul_(0.02).to(torch.bfloat16).cpu()


def timed_load(path: str, quant: str, device: torch.device, trace: Path) -> Any:
    """Loads a model onto the device, and returns the report; the trace is written."""
    import distquant as dq
    from distquant.loading.loader import load_shard
    from distquant.options import RunOptions
    from distquant.parallel.comm import SoloComm

    plan = dq.plan(path, quantization_config=quant, dtype="bfloat16")
    model = load_shard(plan, SoloComm(), device, RunOptions(trace=str(trace)))
    elsewhere = [name for name, value in model.named_parameters() if value.device != device]
    assert not elsewhere, f"not on {device}: {elsewhere[:3]}"
    return model.distquant.report


# -- two ranks ---------------------------------------------------------------------------------------------------------


def two_ranks(run: Run, path: str, quants: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yields method, result and figures of loads over two ranks that share the device: bits, logits and seconds."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_rank, args=(rank, run.scratch, path, quants, run.dry)) for rank in range(2)]
    for process in processes:
        process.start()
    expected = {quant: _on_cpu(path, quant) for quant in quants}
    until = time.monotonic() + PATIENCE * (SLOWER if run.dry else 1)
    for process in processes:
        process.join(max(until - time.monotonic(), 0))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    codes = [process.exitcode for process in processes]
    for quant, (digest, logits) in expected.items():
        answer = run.scratch / f"{quant}.pt"
        if not answer.exists():
            yield quant, "FAILED", f"no answer; {len(hanging)} ranks hang, exit codes {codes}"
            continue
        found, seconds, ours = torch.load(answer)
        bits = "bits equal" if found == digest else "BITS DIFFER"
        if ours is None:
            told = "forward skipped: gloo takes no tensors of the simulated device"
            yield quant, "ok" if found == digest else "FAILED", f"{bits}, {seconds:.2f} s; {told}"
            continue
        off = float((ours - logits).norm() / logits.norm())
        good = found == digest and off < CLOSE
        yield quant, "ok" if good else "FAILED", f"{bits}, logits differ by {off:.1e}, {seconds:.2f} s"


def _on_cpu(path: str, quant: str) -> tuple[str, Tensor]:
    """Returns fingerprint and logits of one process on the CPU."""
    import distquant as dq
    from distquant.loading.loader import load_shard
    from distquant.parallel.comm import SoloComm

    model = load_shard(dq.plan(path, quantization_config=quant, dtype="bfloat16"), SoloComm(), "cpu")
    with torch.no_grad():
        return dq.fingerprint(model), model(torch.arange(1, 33).view(1, -1)).logits.float()


def _rank(rank: int, scratch: Path, path: str, quants: list[str], dry: bool) -> None:
    """One of the two: a process group of our own, because ranks of a launcher may not share a device."""
    import torch.distributed as dist

    import distquant as dq
    from distquant.loading.loader import load_shard
    from distquant.runtime.process_group import GroupComm

    device = device_of(dry)
    assert device is not None
    dist.init_process_group("gloo", init_method=f"file://{scratch / 'store'}", rank=rank, world_size=2)
    for quant in quants:
        plan = dq.plan(path, quantization_config=quant, mesh="tp=2", dtype="bfloat16")
        model = load_shard(plan, GroupComm(plan.mesh, PATIENCE), device)
        digest, logits = dq.fingerprint(model), None
        if not dry:
            with torch.no_grad():
                logits = model(torch.arange(1, 33, device=device).view(1, -1)).logits.float().cpu()
        if rank == 0:
            half = scratch / f"{quant}.half"
            torch.save((digest, model.distquant.report.seconds, logits), half)
            half.rename(scratch / f"{quant}.pt")
    dist.barrier()
    dist.destroy_process_group()
