"""Executes one rank's share of a plan: streams its rows, quantizes them, and assembles the local model."""

from __future__ import annotations

import dataclasses
import importlib
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distquant import hostmem
from distquant.assemble import check_complete, finish, install_styles, localize, set_tensor
from distquant.assemble.adapters import watch_adapters
from distquant.assemble.devices import Devices
from distquant.assemble.finish import fill_computed_buffers
from distquant.assemble.local import local_shape, shard_of
from distquant.assemble.sinks import Placer, Transposer
from distquant.checkpoint import Checkpoint, open_checkpoint
from distquant.comm import Axis, Comm
from distquant.config import parse
from distquant.errors import InputError, Problem
from distquant.planning.load_plan import LoadPlan, TensorPlan
from distquant.report import RankReport
from distquant.schemes import Quantizer, Scheme, config_classes, scheme_for
from distquant.skeleton import build
from distquant.stream.reader import Reader, ReadError, Work
from distquant.stream.rows import row_ranges
from distquant.stream.stored import TORCH_DTYPE, StoredWeight

Progress = Callable[[int, int], None]
"""Called with (bytes of rows taken so far, bytes of rows in all)."""


@dataclass
class Loaded:
    """What a loaded model carries about itself, as `model.distquant`."""

    plan: LoadPlan
    scheme: Scheme
    comm: Comm
    report: RankReport

    def __deepcopy__(self, memo: dict[int, Any]) -> Loaded:
        return self


def scheme_of(plan: LoadPlan) -> Scheme:
    """The scheme that a plan's configuration means."""
    config = parse({**plan.quantization_config, **plan.selection}, config_classes())
    assert config is not None
    return scheme_for(config)


def load_shard(plan: LoadPlan, comm: Comm, device: torch.device | str, progress: Progress | None = None) -> Any:
    """Loads this rank's part of the model.

    Args:
        plan: the same on every rank.
        comm: the ranks; its size is the mesh's.
        device: where this rank's weights go, unless the plan has a device map.
        progress: called as rows arrive.

    Raises:
        InputError: this rank's (or another's) files are not those that were planned.
        ReadError: a file cannot be read as its header says.
    """
    _import_libraries(plan)
    comm.collect(None)  # ranks that import slowly are not counted as loading
    start = time.perf_counter()
    checkpoint = _same_files(plan, comm)
    loading = _Loading(plan, comm, checkpoint, torch.device(device), progress)
    try:
        model = loading.run()
    except ReadError as error:
        raise ReadError(f"rank {comm.rank}: {error}") from error
    loading.report.seconds = time.perf_counter() - start
    model.distquant = Loaded(plan, loading.scheme, comm, loading.report)
    return model


def _import_libraries(plan: LoadPlan) -> None:
    """Imports what loading will need, so that the time of a load is its own."""
    for package in ("transformers", "accelerate", *scheme_of(plan).requires):
        importlib.import_module(package)


def _same_files(plan: LoadPlan, comm: Comm) -> Checkpoint:
    """Opens the checkpoint on this rank and compares it with the plan; a difference on any rank stops all.

    Ranks that were given different plans stop, too; only the folder may have another path on another machine.
    """
    problems: list[Problem] = []
    checkpoint = None
    decided = dataclasses.replace(plan, model="").digest
    for rank, theirs in enumerate(comm.collect(decided)):
        if theirs != decided:
            what = f"rank {rank} has the plan {theirs[:16]}, rank {comm.rank} has {decided[:16]}"
            raise InputError.one("plan", what, "Give every rank the same arguments, or the same plan")
    try:
        checkpoint = open_checkpoint(plan.model)
        mine = checkpoint.digests()
        for file in sorted(plan.shards.keys() | mine.keys()):
            if plan.shards.get(file) != tuple(mine.get(file, ())):
                what = f"on rank {comm.rank} it differs from the planned file (header or size)"
                problems.append(
                    Problem(f"{plan.model}/{file}", what, "Give every rank the same files, then plan again")
                )
    except InputError as error:
        problems += [Problem(f"rank {comm.rank}: {p.where}", p.what, p.fix) for p in error.problems]
    found = [problem for theirs in comm.collect(problems) for problem in theirs]
    if found:
        raise InputError(found)
    assert checkpoint is not None
    return checkpoint


class _TimedAxis:
    """An axis that counts what goes over it and how long that takes."""

    def __init__(self, axis: Axis, report: RankReport):
        self._axis, self._report = axis, report
        self.rank, self.size = axis.rank, axis.size

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        if self.size == 1:
            return tensor
        start = time.perf_counter()
        result = self._axis.all_reduce(tensor, op)
        self._report.stages["exchange"] += time.perf_counter() - start
        self._report.bytes_sent += tensor.nbytes
        self._report.bytes_received += tensor.nbytes
        return result

    def all_gather(self, tensor: Tensor, sizes: list[int], dim: int) -> Tensor:
        return self._axis.all_gather(tensor, sizes, dim)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        return self._axis.broadcast(tensor, source)


@dataclass
class _Loading:
    plan: LoadPlan
    comm: Comm
    checkpoint: Checkpoint
    device: torch.device
    progress: Progress | None
    report: RankReport = field(init=False)
    scheme: Scheme = field(init=False)

    def __post_init__(self) -> None:
        self.report = RankReport(rank=self.comm.rank)
        self.scheme = scheme_of(self.plan)
        self.axis = self.comm.axis("tp")
        self.timed = _TimedAxis(self.axis, self.report)
        self.filled: list[str] = []
        self.devices = Devices(self.device, self.plan.device_map)

    def run(self) -> Any:
        plan = self.plan
        model = build(self.checkpoint.path, plan.dtype, trust_remote_code=plan.trust_remote_code)
        localize(model, plan, self.scheme, self.axis.rank)
        streamed = [t for t in plan.tensors if not self._restored(t)]
        with Reader(self.checkpoint.path, plan.staging) as reader:
            self._stream(model, streamed, reader)
            for tensor in plan.tensors:
                if self._restored(tensor):
                    self._restore(model, tensor, reader)
            self.report.bytes_read = reader.stats.bytes
            self.report.stages["read"] = reader.stats.seconds
            self.report.staging_bytes = reader.stats.largest
        self._complete(model)
        self.report.peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.device.type == "cuda":
            self.report.peak_device_bytes = torch.cuda.max_memory_allocated(self.device)
        return model

    def _complete(self, model: Any) -> None:
        plan = self.plan
        fill_computed_buffers(model, self.devices.of)
        elsewhere = {*self.devices.offloaded, *plan.tied}
        check_complete(model, self.filled, [tensor.name for tensor in plan.tensors], elsewhere)
        if self.axis.size > 1:
            install_styles(model, plan, self.axis)
            watch_adapters(model, plan, self.axis)
        finish(model, plan.model, self.axis)
        self.scheme.finish_model(model)
        if plan.device_map is not None:
            self.devices.dispatch(model)

    def _restored(self, tensor: TensorPlan) -> bool:
        return tensor.scheme != "none" and self.plan.prequantized

    # -- streaming -------------------------------------------------------------------------------------------------

    def _stream(self, model: Any, tensors: list[TensorPlan], reader: Reader) -> None:
        placers = {tensor.name: self._placer(tensor) for tensor in tensors if tensor.scheme == "none"}
        works = [self._work(tensor, placers.get(tensor.name)) for tensor in tensors]
        total = sum(r.nbytes for work in works for r in work.ranges)
        done, current, sink = 0, -1, None
        stages = self.report.stages
        for chunk in reader.stream(works):
            while current < chunk.task:
                self._finish(model, tensors, current, sink)
                current += 1
                sink = placers.pop(tensors[current].name, None) or self._sink(model, tensors[current])
            tensor = tensors[current]
            assert sink is not None
            done += chunk.rows.numel()
            if self.progress is not None:
                self.progress(done, total)
            if chunk.buffer is None:
                continue  # read straight into its place
            step = works[chunk.task].row_step
            if chunk.local % step:
                what = f"its parts start at row {chunk.local}, quantization blocks need multiples of {step}"
                raise InputError.one(tensor.name, what, "Skip the module, or convert the checkpoint first")
            start = time.perf_counter()
            rows = chunk.rows.view(TORCH_DTYPE[chunk.dtype]).to(getattr(torch, tensor.dtype))
            if tensor.scheme != "none" and self.devices.of(tensor.name).type != "cpu":
                rows = rows.to(self.devices.of(tensor.name))
            copied = time.perf_counter()
            exchanged = stages["exchange"]
            sink.update(rows, chunk.local)
            stage = "place" if tensor.scheme == "none" else "quantize"
            stages["copy"] += copied - start
            stages[stage] += time.perf_counter() - copied - (stages["exchange"] - exchanged)
        while current < len(tensors):
            self._finish(model, tensors, current, sink)
            current += 1
            if current < len(tensors):
                sink = placers.pop(tensors[current].name, None) or self._sink(model, tensors[current])

    def _work(self, tensor: TensorPlan, placer: Placer | None) -> Work:
        cut = self.plan.cuts[tensor.cut] if tensor.cut else None
        segments = cut.segments(self.axis.rank) if cut else ()
        shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
        ranges = list(row_ranges(shape, tensor.sources, self.checkpoint.tensors, tensor.dim, segments))
        step = 1
        if tensor.scheme != "none" and not tensor.transposed:
            step = self.scheme.row_step(shard_of(tensor, self.plan, self.axis.rank))
        pace = max((r.row_bytes for r in ranges), default=0) if tensor.dim == 1 else 0
        into = None
        if placer is not None and placer.target.device.type == "cpu":
            stored = {TORCH_DTYPE[r.dtype] for r in ranges}
            if stored == {placer.target.dtype} and placer.target.numel():
                into = placer.rows.view(torch.uint8)
        return Work(ranges, step, pace, into)

    def _quantizer(self, tensor: TensorPlan, module: nn.Module, device: torch.device) -> Quantizer:
        return self.scheme.quantizer(shard_of(tensor, self.plan, self.axis.rank), module, self.timed, device)

    def _sink(self, model: Any, tensor: TensorPlan) -> Any:
        module = model.get_submodule(tensor.name.rpartition(".")[0])
        quantizer = self._quantizer(tensor, module, self.devices.of(tensor.name))
        if tensor.transposed:
            return Transposer((tensor.shape[1], tensor.shape[0]), getattr(torch, tensor.dtype), quantizer)
        return quantizer

    def _placer(self, tensor: TensorPlan) -> Placer:
        """The final memory of an unquantized tensor; untouched pages cost nothing until they are read into."""
        shape = local_shape(tensor, self.plan, self.axis.rank)
        return Placer(hostmem.empty(shape, getattr(torch, tensor.dtype), self.devices.of(tensor.name)))

    def _finish(self, model: Any, tensors: list[TensorPlan], index: int, sink: Any) -> None:
        if index < 0 or sink is None:
            return
        tensor = tensors[index]
        start, exchanged = time.perf_counter(), self.report.stages["exchange"]
        sink.finish()
        if tensor.scheme == "none":
            self._put(model, tensor, sink.target)
        else:
            self._account(model, tensor)
        waited = self.report.stages["exchange"] - exchanged
        stage = "place" if tensor.scheme == "none" else "quantize"
        self.report.stages[stage] += time.perf_counter() - start - waited

    def _put(self, model: Any, tensor: TensorPlan, value: Tensor) -> None:
        self.filled.append(tensor.name)
        self.report.unquantized_bytes += value.nbytes
        if self.devices.place(tensor.name) == "disk":
            self.devices.offload(tensor.name, value)
        else:
            set_tensor(model, tensor.name, value, self.plan.tied)

    # -- pre-quantized ---------------------------------------------------------------------------------------------

    def _restore(self, model: Any, tensor: TensorPlan, reader: Reader) -> None:
        infos = {source.component: self.checkpoint.tensors[source.tensor] for source in tensor.sources}
        module = model.get_submodule(tensor.name.rpartition(".")[0])
        shard = shard_of(tensor, self.plan, self.axis.rank)
        start = time.perf_counter()
        self.scheme.restore(shard, module, StoredWeight(reader, infos), self.devices.of(tensor.name))
        self.report.stages["place"] += time.perf_counter() - start
        self._account(model, tensor)

    def _account(self, model: Any, tensor: TensorPlan) -> None:
        self.filled.append(tensor.name)
        module = model.get_submodule(tensor.name.rpartition(".")[0])
        self.report.quantized_bytes += sum(p.nbytes for n, p in _state(module) if n != "bias")


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a quantized module stores, as `state_dict` would list it, without constants."""
    for name, value in module.state_dict().items():
        if not name.endswith(("quant_map", "weight_format")) and "quant_state" not in name:
            yield name, value
