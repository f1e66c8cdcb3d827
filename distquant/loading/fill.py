"""Puts what has arrived of a tensor into the local model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from distquant.loading.devices import Devices
from distquant.loading.jobs import Job
from distquant.loading.local_modules import local_shape, set_tensor, shard_of, stored_turned
from distquant.loading.report import RankReport
from distquant.loading.shard_buffer import Allocator, ShardBuffer
from distquant.model import STAR
from distquant.parallel.experts import LocalExperts
from distquant.planning.expert_parallel import Piece
from distquant.planning.load_plan import LoadPlan, TensorPlan
from distquant.quantization import QuantizedScheme, Scheme, Shard


class WeightPlacer:
    """Fills one rank's model, tensor by tensor.

    Args:
        model: with its experts as `shard_experts` left them; the rest is localized before anything is filled in.
        plan: the whole plan.
        scheme: the plan's.
        at: the rank's position on the axes of the mesh.
        devices: where tensors lie.
        ops: kernels of a device.
        report: counts bytes.

    Attributes:
        filled: names of the tensors that are there.
    """

    def __init__(
        self,
        model: Any,
        plan: LoadPlan,
        scheme: Scheme,
        at: Mapping[str, int],
        devices: Devices,
        ops: Callable[[torch.device], Any],
        report: RankReport,
    ):
        self.model, self.plan, self.scheme, self.at = model, plan, scheme, at
        self.devices, self.ops, self.report = devices, ops, report
        self.filled: list[str] = []
        self._stored: dict[str, Tensor] = {}
        """Components of a stored weight that came before its last."""
        self._whole: set[str] = set()
        """Those of them that were not cut."""
        self._stacks = {tensor.name: 0 for tensor in plan.tensors if tensor.experts is not None}
        """Experts that have come, of each stack."""
        self._experts: dict[str, LocalExperts] = {}
        """Modules of experts, by name; each is asked for many times."""
        self._homes = threading.Lock()

    @property
    def _quantized(self) -> QuantizedScheme:
        """The scheme of a tensor that is quantized."""
        assert isinstance(self.scheme, QuantizedScheme), "no other scheme converts modules"
        return self.scheme

    def home(self, job: Job) -> Allocator | None:
        """Where components of an expert are read or quantized to: straight into the memory of its stack.

        Threads may ask for the homes of several experts of a stack at once.
        """
        piece, device = job.piece, job.task.device
        if piece.stack.experts is None:
            return None
        module, number, path = self._expert(piece)
        if piece.tensor.scheme == "none":
            return self._alone(lambda _, count, dtype: module.home(path, number, device))
        if self.plan.dequantize:
            return None
        stack = module.stack(path.partition(".")[0])
        return self._alone(lambda name, count, dtype: stack.home(name, number, count, dtype, device))

    def _alone(self, home: Allocator) -> Allocator:
        """Asked by one thread at a time."""

        def alone(name: str, count: int, dtype: torch.dtype) -> Tensor | None:
            with self._homes:
                return home(name, count, dtype)

        return alone

    def _expert(self, piece: Piece) -> tuple[LocalExperts, int, str]:
        """The module that an expert belongs to, its number there, and the rest of its path."""
        owner, _, path = piece.stack.name.partition(f".{STAR}.")
        if owner not in self._experts:
            self._experts[owner] = self.model.get_submodule(owner)
        module = self._experts[owner]
        return module, piece.number - module.first, path

    def fill(self, job: Job, sink: ShardBuffer) -> None:
        """Puts what has arrived into the model; components of a stored weight are gathered until the last is there."""
        tensor, memory = job.tensor, sink.memory
        if job.piece.stack.experts is not None:
            self._fill_expert(job, sink)
            return
        if tensor.scheme == "none":
            self._put(tensor, memory[""].view(local_shape(tensor, self.plan, self.at["tp"])))
            return
        if not self._gather(job, memory):
            return
        module = self.model.get_submodule(tensor.name.rpartition(".")[0])
        shard = shard_of(tensor, self.plan, self.at["tp"])
        if self.plan.dequantize:
            self._put(tensor, self._dequantized(module, tensor, shard))
            return
        if job.transfer.stored is not None:
            self._quantized.load_prequantized(shard, module, *self._taken())
        else:
            self._quantized.load_encoded(shard, module, memory, self.ops(self.devices.of(tensor.name)))
        self.filled.append(tensor.name)
        self.report.quantized_bytes += self._quantized.held_nbytes(module)
        if self.devices.place(tensor.name) == "disk":
            self.devices.offload_module(tensor.name.rpartition(".")[0], module)

    def _gather(self, job: Job, memory: Mapping[str, Tensor]) -> bool:
        """Keeps a stored component; whether the weight is complete, as one quantized on the way always is."""
        if job.transfer.stored is not None:
            self._stored[job.transfer.stored] = memory[job.transfer.stored]
            self._whole |= job.transfer.whole
        return job.transfer.stored is None or job.last

    def _taken(self) -> tuple[dict[str, Tensor], frozenset[str]]:
        """The gathered components of a stored weight, and those of them that are whole; they are gone then."""
        found = self._stored, frozenset(self._whole)
        self._stored, self._whole = {}, set()
        return found

    def _fill_expert(self, job: Job, sink: ShardBuffer) -> None:
        """Puts one expert's components into its stack, or what they mean into a plain parameter."""
        piece, tensor, memory = job.piece, job.tensor, sink.memory
        module, number, path = self._expert(piece)
        if tensor.scheme == "none":  # it lies where it belongs
            self.report.unquantized_bytes += memory[""].nbytes
            self._count_expert(module, piece)
            return
        shard = shard_of(tensor, self.plan, self.at["tp"])
        ops = self.ops(self.devices.of(tensor.name))
        if not self._gather(job, memory):
            return
        if job.transfer.stored is not None:
            components = self._quantized.pack_prequantized(shard, *self._taken())
        else:
            components = self._quantized.pack(shard, memory, ops)
        if self.plan.dequantize:
            home = module.home(path, number, job.task.device)
            value = self._quantized.dequantize(shard, components, home.dtype, ops)
            home.copy_(value.reshape(-1))
            self.report.unquantized_bytes += home.nbytes
        else:
            module.stack(path.partition(".")[0]).take(number, components)
        self._count_expert(module, piece)

    def _count_expert(self, module: LocalExperts, piece: Piece) -> None:
        """Counts the experts of a stack that are there; with the last, the stack is filled."""
        name = piece.stack.name
        self._stacks[name] += 1
        if self._stacks[name] < module.last - module.first:
            return
        self.filled.append(name)
        if piece.tensor.scheme != "none" and not self.plan.dequantize:
            stack = module.stack(name.rpartition(f".{STAR}.")[2].partition(".")[0])
            stack.release_unused()
            self.report.quantized_bytes += sum(
                value.nbytes for name, value in stack.named_buffers() if name not in self._quantized.constants
            )

    def _dequantized(self, module: Any, tensor: TensorPlan, shard: Shard) -> Tensor:
        """What the stored components mean, in the form of the model's own module."""
        quantized = self._quantized.module(module, shard)
        self._quantized.load_prequantized(shard, quantized, *self._taken())
        value = self._quantized.dequantized(quantized, shard, self.ops(self.devices.of(tensor.name)))
        value = value.to(getattr(torch, tensor.dtype))
        return value.t().contiguous() if stored_turned(module, tensor) else value

    def _put(self, tensor: TensorPlan, value: Tensor) -> None:
        self.filled.append(tensor.name)
        self.report.unquantized_bytes += value.nbytes
        owner, _, leaf = tensor.name.rpartition(".")
        if self.devices.place(tensor.name) == "disk" and leaf not in self.model.get_submodule(owner)._buffers:
            self.devices.offload(tensor.name, value)
        else:
            set_tensor(self.model, tensor.name, value, self.plan.tied)
