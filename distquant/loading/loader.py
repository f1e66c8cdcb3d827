"""Loads one rank's part of a plan: streams and quantizes rows, and fills the local model."""

from __future__ import annotations

import importlib
import resource
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from distquant.accelerator.facts import peak_memory, reset_peak_memory, resolved
from distquant.checkpoint import Checkpoint
from distquant.config import parse
from distquant.errors import DistquantError, RankError
from distquant.garbage_collection import without_collector
from distquant.kernels.choice import Choice, choose
from distquant.loading import delegated
from distquant.loading.adapter import apply_adapter, find_adapter
from distquant.loading.devices import Devices
from distquant.loading.dropped_biases import check_dropped_biases
from distquant.loading.fill import WeightPlacer
from distquant.loading.finish import check_complete, fill_computed_buffers, finish, forbid_saving
from distquant.loading.forward import check_forward, set_forward
from distquant.loading.kernel_trial import check_compiles
from distquant.loading.local_modules import shard_experts, shard_modules
from distquant.loading.mapped import MappedTensors
from distquant.loading.node_tasks import buffer_for, tasks_of
from distquant.loading.planned_files import check_paths, check_unchanged, open_planned
from distquant.loading.report import PINNED, RankReport
from distquant.loading.shard_buffer import ShardBuffer
from distquant.loading.stream.accelerator import Collectives, await_devices
from distquant.loading.stream.engine import Engine
from distquant.loading.stream.files import Files, ReadError
from distquant.loading.stream.load_state import LoadState
from distquant.loading.stream.stage_timer import StageTimer
from distquant.loading.stream.tasks import Task
from distquant.loading.stream.trace import write_trace
from distquant.loading.warm_up import warming_up
from distquant.model import ModuleNames
from distquant.options import ALL_REDUCE, Forward, LoadProgress, Progress, RunOptions
from distquant.parallel.attention_weights import install_weight_gathering
from distquant.parallel.comm import Comm
from distquant.parallel.experts import join_experts
from distquant.parallel.lora import watch_adapters
from distquant.parallel.replicas import install_wrapper_checks
from distquant.parallel.tensor_parallel import install_styles
from distquant.planning.load_plan import LoadPlan
from distquant.planning.prepared import Prepared, build_for_load
from distquant.planning.read_assignment import node_ranks
from distquant.planning.validation import check_kernel, check_supported
from distquant.process_state import changing_process_state
from distquant.progress import status
from distquant.quantization import ModuleFactory, Scheme, config_classes, scheme_for
from distquant.quantization.linear.state import state_of
from distquant.sharding.mesh import REPLICA

MODULES = {"optimum-quanto": "optimum.quanto"}
"""Module to import of a package, where their names differ."""


@dataclass
class Loaded:
    """A loaded model's record of its load, as `model.distquant`."""

    plan: LoadPlan
    scheme: Scheme
    comm: Comm
    report: RankReport
    tokenizer: Any = None
    """The model's tokenizer, once something has needed it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Loaded:
        return self


def scheme_of(plan: LoadPlan) -> Scheme:
    """Returns the scheme of a plan's configuration."""
    config = parse({**plan.quantization_config, **plan.selection}, config_classes(), stored=plan.prequantized)
    assert config is not None
    names = ModuleNames({tensor.name: tensor.sources for tensor in plan.tensors}, plan.prequantized)
    return scheme_for(config, names)


@without_collector()
def load_shard(
    plan: LoadPlan,
    comm: Comm,
    device: torch.device | str,
    options: RunOptions | None = None,
    progress: Progress | None = None,
    prepared: Prepared | None = None,
) -> Any:
    """Loads this rank's part of the model.

    Args:
        plan: the same on every rank.
        comm: the ranks; its size is the mesh's.
        device: where this rank's weights go, unless the plan has a device map.
        options: how to run; the same on every rank.
        progress: called as rows arrive.
        prepared: the plan's checkpoint and model, if they are open already; the model becomes the result.

    Raises:
        InputError: this rank's (or another's) files are not those that were planned.
        ReadError: a file cannot be read as its header says.
        RankError: another rank failed, or sent nothing for the timeout.
    """
    check_supported(plan)
    options = options or RunOptions()
    device = resolved(device)
    adapter = find_adapter(plan, options.adapter)
    load = _delegate if scheme_of(plan).delegated else _load
    model = load(plan, comm, device, options, progress, prepared)
    if adapter is not None:
        status("applying the adapter")
        apply_adapter(model, plan, comm.axis("tp").rank, adapter)
    return model


def _load(
    plan: LoadPlan,
    comm: Comm,
    device: torch.device,
    options: RunOptions,
    progress: Progress | None,
    prepared: Prepared | None,
) -> Any:
    """Loads the model with the plan's scheme."""
    # Whatever cannot run here fails before anything is read.
    status("importing libraries of the method")
    with changing_process_state():
        check_kernel(plan, scheme_of(plan), choose(options.kernel, device).kernel)
        check_forward(plan, scheme_of(plan), Forward(options.forward), device)
        check_compiles(plan, options.kernel, device)
        _import_libraries(plan)
    if comm.world_size > 1:
        status("waiting for the other ranks")
    comm.collect(None)  # ranks that import slowly are not counted as loading
    status("loading")
    start = time.perf_counter()
    checkpoint = open_planned(plan, comm, prepared)
    loading = _Loading(
        plan, comm, checkpoint, device, options, progress, prepared.model if prepared is not None else None
    )
    try:
        model = loading.run()
    except ReadError as error:
        raise ReadError(f"rank {comm.rank}: {error}") from error
    except RuntimeError as error:
        raise _cause(error, loading.load_state) from error
    loading.report.seconds = time.perf_counter() - start
    model.distquant = Loaded(plan, loading.scheme, comm, loading.report)
    if options.trace is not None:
        write_trace(options.trace, comm, loading.stages, start)
    return model


def _delegate(
    plan: LoadPlan,
    comm: Comm,
    device: torch.device,
    options: RunOptions,
    progress: Progress | None,
    prepared: Prepared | None,
) -> Any:
    """Lets transformers load the model; the report says so, and has no stages."""
    scheme, start = scheme_of(plan), time.perf_counter()
    status("loading with transformers")
    report = RankReport(rank=comm.rank, kernel=f"transformers: its own quantizer for {scheme.config.quant_method!r}")
    checkpoint = open_planned(plan, comm, prepared)
    check_paths(checkpoint)
    model = delegated.load(plan, scheme, device)
    check_paths(checkpoint)
    report.seconds = time.perf_counter() - start
    report.quantized_bytes = sum(value.nbytes for _, value in state_of(model))
    report.peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model.distquant = Loaded(plan, scheme, comm, report)
    return model


def _cause(error: RuntimeError, load_state: LoadState) -> BaseException:
    """Returns the failure of another rank if it is why a collective failed here; else the error itself."""
    known = isinstance(error, DistquantError) or not isinstance(load_state.failure, RankError)
    return error if known or load_state.failure is None else load_state.failure


def _import_libraries(plan: LoadPlan) -> None:
    """Imports what loading will need, so that imports do not count as loading time."""
    for package in ("transformers", "accelerate", *scheme_of(plan).requires):
        importlib.import_module(MODULES.get(package, package))


@dataclass
class _Loading:
    plan: LoadPlan
    comm: Comm
    checkpoint: Checkpoint
    device: torch.device
    options: RunOptions
    progress: Progress | None
    model: Any = None
    """On `meta`, if it has been built already."""
    report: RankReport = field(init=False)
    scheme: Scheme = field(init=False)

    def __post_init__(self) -> None:
        self.report = RankReport(rank=self.comm.rank)
        self.scheme = scheme_of(self.plan)
        self.axis = self.comm.axis("tp")
        self.coordinates = self.plan.mesh.coordinates(self.comm.rank)
        self.devices = Devices(self.device, self.plan.device_map)
        self.accelerators = self.devices.accelerators(tensor.name for tensor in self.plan.tensors)
        self.stages = StageTimer(traced=self.options.trace is not None)
        self.load_state = LoadState(self.comm.timeout, self.comm.silent)
        self.collectives = Collectives(self.load_state)
        self.kernels: dict[torch.device, Choice] = {}
        self.started = time.perf_counter()
        self.mapped = MappedTensors()

    def run(self) -> Any:
        for device in self.accelerators:
            reset_peak_memory(device)
        files = Files(self.checkpoint.folder, self.options.io, self.checkpoint.stamps())
        choice = choose(self.options.kernel, self.device)
        try:
            with warming_up(self.plan, self.scheme, self.device, choice):
                placer = self._fill(files)
            check_unchanged(files, self.comm)
        finally:
            files.close()
        self._complete(placer.model, placer.filled)
        self.mapped.protect_files(placer.model)
        await_devices(self.accelerators, self.load_state, self._late)  # before any seconds are taken
        self._fill_report(files)
        return placer.model

    def _fill(self, files: Files) -> WeightPlacer:
        """Builds the model, and fills it from the files."""
        plan = self.plan
        check_dropped_biases(plan, self.checkpoint, files, self.comm)
        model, self.model = self.model, None
        if model is None:
            model = build_for_load(self.checkpoint, plan.dtype, plan)
        with changing_process_state():
            shard_experts(model, plan, self.scheme, self.coordinates["tp"], self.coordinates["ep"])
        placer = WeightPlacer(model, plan, self.scheme, self.coordinates["tp"], self.devices, self._ops, self.report)
        self._stream(placer, files)
        return placer

    def _late(self, device: torch.device) -> RankError:
        return RankError(self.comm.rank, f"{device} was not done within {self.load_state.timeout:g} s")

    def _ops(self, device: torch.device) -> Any:
        """Returns the kernels for a device."""
        if device not in self.kernels:
            self.kernels[device] = choose(self.options.kernel, device)
        return self.kernels[device].ops

    def _fill_report(self, files: Files) -> None:
        report = self.report
        read = files.stats
        report.bytes_read, report.direct_bytes, report.retries = read.bytes, read.direct, read.retries
        report.kernel = "; ".join(choice.reason for choice in self.kernels.values())
        report.stages = dict(self.stages.busy)
        report.limit = self.stages.limit(time.perf_counter() - self.started)
        report.peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for device in self.accelerators:
            report.devices.append({"device": str(device), "peak_bytes": peak_memory(device)})
        report.peak_device_bytes = max((one["peak_bytes"] or 0 for one in report.devices), default=0)

    def _complete(self, model: Any, filled: list[str]) -> None:
        plan = self.plan
        fill_computed_buffers(model, self.devices.of)
        elsewhere = {*self.devices.offloaded, *plan.tied}
        check_complete(model, filled, plan, elsewhere)
        if self.axis.size > 1:
            install_styles(model, plan, self.axis)
            watch_adapters(model, plan, self.axis)
            install_weight_gathering(model, plan, self.axis)
        sharded = plan.mesh.ep * plan.mesh.tp > 1
        if sharded:
            install_wrapper_checks(model, plan, self.comm.rank)
        if plan.dequantize and not sharded:
            for name in plan.experts:
                model.set_submodule(name, model.get_submodule(name).to_original())
        else:
            join_experts(model, plan, self.comm)
            sharded = sharded or bool(plan.experts)
        own_batches = plan.dispatch != ALL_REDUCE and plan.mesh.ep > 1
        same_tokens = self.comm.axis("tp" if own_batches else REPLICA)
        finish(model, plan.model, same_tokens, sharded, self.comm.axis(REPLICA) if own_batches else None)
        if not plan.dequantize:
            with changing_process_state():
                if isinstance(self.scheme, ModuleFactory):
                    self.scheme.finish_model(model)
                    forbid_saving(model, self.scheme.unsaved(model))
                self.report.forward = set_forward(model, self.scheme, Forward(self.options.forward), self.devices)
        if plan.device_map is not None:
            self.devices.dispatch(model, plan.tied)

    # -- streaming -------------------------------------------------------------------------------------------------

    def _stream(self, placer: WeightPlacer, files: Files) -> None:
        plan = self.plan
        node = node_ranks(plan.nodes, self.comm.rank)
        tasks = list(tasks_of(plan, self.scheme, node, self.checkpoint.tensors, self.devices.of, self._ops))
        # What hooks move for each forward is read: a page of a file would be read from the disk again and again.
        placed = [task for task in tasks if not self.devices.is_offloaded(task.transfer.tensor.name)]
        positions = [plan.mesh.coordinates(rank)["tp"] for rank in range(plan.mesh.size)]
        self.mapped = mapped = MappedTensors.of(placed, files, self.options.io, self.comm, node, positions)
        partial = any(plan.nodes[rank] != plan.nodes[self.comm.rank] for rank in plan.mesh.peers(self.comm.rank, "tp"))

        def sink(task: Task) -> ShardBuffer:
            allocator = mapped.allocator(task) or placer.allocator(task)
            return buffer_for(task, self.coordinates["tp"], partial, allocator, engine.gathering)

        def finished(task: Task, filled: Any) -> None:
            filled.upload(keep=() if partial else placer.taken_on_the_host(task))
            if partial:
                self._join_statistics(task, filled)
            placer.fill(task, filled)
            filled.release()

        def progress(done: int, total: int) -> None:
            assert self.progress is not None
            self.progress(LoadProgress(done, total, self.stages.limit(time.perf_counter() - self.started)))

        with Engine(
            self.comm.rank,
            tasks,
            files,
            plan.staging,
            self.load_state,
            self.stages,
            sink,
            finished,
            progress if self.progress is not None else None,
            joined=partial,
        ) as engine:
            if self.comm.world_size > 1:
                engine.peers.connect(self.comm, node)
            engine.start()
            with changing_process_state():
                shard_modules(
                    placer.model, plan, self.scheme, self.coordinates["tp"]
                )  # while the first weights are read
            engine.run()
            self.report.mapped_bytes = mapped.nbytes
            self.report.staging_bytes = engine.staging_buffer.slot_bytes * engine.staging_buffer.slots
            if self.accelerators:
                self.report.load_buffer = f"not {PINNED}: {engine.not_pinned}" if engine.not_pinned else PINNED
            self.report.bytes_sent += engine.traffic.sent
            self.report.bytes_received += engine.traffic.received

    def _join_statistics(self, task: Task, sink: ShardBuffer) -> None:
        """Adds the statistics of rows that other nodes read: a maximum over zeros, which is exact."""

        def late() -> RankError:
            fault = (
                f"the statistics of {task.name} were not joined with other nodes' within {self.load_state.timeout:g} s"
            )
            return RankError(self.comm.rank, fault)

        for row_layout in task.row_layouts:
            if row_layout.replicated:
                start, values = time.perf_counter(), sink.memory[row_layout.name]
                # As integers: non-negative floats order the same, and a NaN stays one.
                self.collectives.run(lambda v: self.axis.all_reduce(v, "max"), values.view(torch.int32), late)
                self.stages.add("exchange", start, task.name, values.nbytes)
                self.report.bytes_sent += values.nbytes
                self.report.bytes_received += values.nbytes
