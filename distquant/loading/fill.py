"""Puts the arrived components of a tensor into the local model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from distquant.loading.devices import Devices
from distquant.loading.local_modules import local_shape, set_tensor, shard_of, stored_transposed
from distquant.loading.report import RankReport
from distquant.loading.shard_buffer import Allocator, ShardBuffer
from distquant.loading.stream.tasks import Task
from distquant.model import STAR
from distquant.parallel.experts import LocalExperts
from distquant.planning.load_plan import LoadPlan, TensorPlan
from distquant.planning.transfers import Transfer
from distquant.quantization import QuantizedScheme, Scheme, Shard
from distquant.quantization.stored_values import check_values


class WeightPlacer:
    """Fills one rank's model, tensor by tensor.

    Args:
        model: with its experts as `shard_experts` left them; `shard_modules` runs before anything is filled in.
        plan: the whole plan.
        scheme: the plan's.
        tp: the rank's position on tp.
        devices: places of tensors.
        ops: gives the kernels of a device.
        report: counts bytes.

    Attributes:
        filled: names of the tensors that are in place.
    """

    def __init__(
        self,
        model: Any,
        plan: LoadPlan,
        scheme: Scheme,
        tp: int,
        devices: Devices,
        ops: Callable[[torch.device], Any],
        report: RankReport,
    ):
        self.model, self.plan, self.scheme, self.tp = model, plan, scheme, tp
        self.devices, self.ops, self.report = devices, ops, report
        self.filled: list[str] = []
        self._collected: dict[str, Tensor] = {}
        """Components of a stored weight that came before its last."""
        self._replicated: set[str] = set()
        """Those of them that were not sharded."""
        self._stacks = {tensor.name: 0 for tensor in plan.tensors if tensor.experts is not None}
        """Number of experts of each stack that are there."""
        self._experts: dict[str, LocalExperts] = {}
        """Modules of experts, by name; each is asked for many times."""
        self._allocating = threading.Lock()

    @property
    def _quantized(self) -> QuantizedScheme:
        """The scheme of a tensor that is quantized."""
        assert isinstance(self.scheme, QuantizedScheme), "no other scheme converts modules"
        return self.scheme

    def allocator(self, task: Task) -> Allocator | None:
        """Returns what gives components of an expert their place in the memory of its stack; None for other tensors.

        Threads may ask for the memory of several experts of a stack at once.
        """
        transfer, device = task.transfer, task.device
        if transfer.stack.experts is None:
            return None
        module, number, path = self._expert(transfer)
        if transfer.tensor.scheme == "none":
            return self._one_at_a_time(lambda _, count, dtype: module.home(path, number, device))
        if self.plan.dequantize:
            return None
        stack = module.stack(path.partition(".")[0])
        return self._one_at_a_time(lambda name, count, dtype: stack.home(name, number, count, dtype, device))

    def _one_at_a_time(self, allocator: Allocator) -> Allocator:
        """Returns the allocator, called by one thread at a time: the first call makes the memory of a whole stack."""

        def locked(name: str, count: int, dtype: torch.dtype) -> Tensor | None:
            with self._allocating:
                return allocator(name, count, dtype)

        return locked

    def _expert(self, transfer: Transfer) -> tuple[LocalExperts, int, str]:
        """Returns the module that an expert belongs to, its number there, and the rest of its path."""
        owner, _, path = transfer.stack.name.partition(f".{STAR}.")
        if owner not in self._experts:
            self._experts[owner] = self.model.get_submodule(owner)
        module = self._experts[owner]
        return module, transfer.expert - module.first, path

    def taken_on_the_host(self, task: Task) -> frozenset[str]:
        """Returns the components of a tensor that the scheme takes where they are gathered, in host memory."""
        if task.transfer.tensor.scheme == "none" or task.encode is None or not self._quantized.statistics_on_host:
            return frozenset()
        return task.transfer.kind.replicated

    def fill(self, task: Task, buffer: ShardBuffer) -> None:
        """Puts what has arrived into the model; components of a stored weight are collected until the last is there."""
        tensor, memory = task.transfer.tensor, buffer.memory
        if task.transfer.stack.experts is not None:
            self._fill_expert(task, memory)
            return
        if tensor.scheme == "none":
            self._put(tensor, memory[""].view(local_shape(tensor, self.plan, self.tp)))
            return
        if not self._collect(task.transfer, memory):
            return
        module = self.model.get_submodule(tensor.name.rpartition(".")[0])
        shard = shard_of(tensor, self.plan, self.tp)
        if self.plan.dequantize:
            self._put(tensor, self._dequantized(module, tensor, shard))
            return
        if task.transfer.kind.component is not None:
            self._quantized.load_prequantized(shard, module, *self._take_collected())
        else:
            self._quantized.load_encoded(shard, module, memory, self.ops(self.devices.of(tensor.name)))
        self.filled.append(tensor.name)
        self.report.quantized_bytes += self._quantized.held_nbytes(module)
        if self.devices.place(tensor.name) == "disk":
            self.devices.offload_module(tensor.name.rpartition(".")[0], module)

    def _collect(self, transfer: Transfer, memory: Mapping[str, Tensor]) -> bool:
        """Keeps a stored component; returns True if the weight is complete, as one quantized on the way always is.

        Raises:
            InputError: its values are not what its kernel takes them for.
        """
        component = transfer.kind.component
        if component is None:
            return True
        name = transfer.tensor.name
        check_values(name, component, self._quantized.value_check(name, component), memory[component])
        self._collected[component] = memory[component]
        self._replicated |= transfer.kind.replicated
        return transfer.last

    def _take_collected(self) -> tuple[dict[str, Tensor], frozenset[str]]:
        """Returns the collected components of a stored weight, and those of them that are replicated; forgets them."""
        collected, replicated = self._collected, frozenset(self._replicated)
        self._collected, self._replicated = {}, set()
        return collected, replicated

    def _fill_expert(self, task: Task, memory: dict[str, Tensor]) -> None:
        """Puts one expert's components into its stack, or their values into a plain parameter."""
        transfer, tensor = task.transfer, task.transfer.tensor
        module, number, path = self._expert(transfer)
        if tensor.scheme == "none":  # the allocator gave it its place in the parameter
            self.report.unquantized_bytes += memory[""].nbytes
            self._count_expert(module, transfer)
            return
        shard = shard_of(tensor, self.plan, self.tp)
        ops = self.ops(self.devices.of(tensor.name))
        if not self._collect(transfer, memory):
            return
        if transfer.kind.component is not None:
            components = self._quantized.pack_prequantized(shard, *self._take_collected())
        else:
            components = self._quantized.pack(shard, memory, ops)
        if self.plan.dequantize:
            target = module.home(path, number, task.device)
            value = self._quantized.dequantize(shard, components, target.dtype, ops)
            target.copy_(value.reshape(-1))
            self.report.unquantized_bytes += target.nbytes
        else:
            module.stack(path.partition(".")[0]).take(number, components)
        self._count_expert(module, transfer)

    def _count_expert(self, module: LocalExperts, transfer: Transfer) -> None:
        """Counts the experts of a stack that are there; with the last, the stack is filled."""
        name = transfer.stack.name
        self._stacks[name] += 1
        if self._stacks[name] < module.last - module.first:
            return
        self.filled.append(name)
        if transfer.tensor.scheme != "none" and not self.plan.dequantize:
            stack = module.stack(name.rpartition(f".{STAR}.")[2].partition(".")[0])
            stack.release_unused()
            self.report.quantized_bytes += sum(
                value.nbytes for name, value in stack.named_buffers() if name not in self._quantized.constants
            )

    def _dequantized(self, module: Any, tensor: TensorPlan, shard: Shard) -> Tensor:
        """Returns the values of the stored components, in the form of the model's own module."""
        quantized = self._quantized.module(module, shard)
        self._quantized.load_prequantized(shard, quantized, *self._take_collected())
        value = self._quantized.dequantized(quantized, shard, self.ops(self.devices.of(tensor.name)))
        value = value.to(getattr(torch, tensor.dtype))
        return value.t().contiguous() if stored_transposed(module, tensor) else value

    def _put(self, tensor: TensorPlan, value: Tensor) -> None:
        self.filled.append(tensor.name)
        self.report.unquantized_bytes += value.nbytes
        owner, _, leaf = tensor.name.rpartition(".")
        if self.devices.place(tensor.name) == "disk" and leaf not in self.model.get_submodule(owner)._buffers:
            self.devices.offload(tensor.name, value)
        else:
            set_tensor(self.model, tensor.name, value, self.plan.tied)
