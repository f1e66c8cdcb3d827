"""compressed-tensors: integers of 1 to 8 bits and FP8, in groups, rows, tiles or whole tensors; several at once.

`storage` describes the format; weights that are quantized while they are loaded have the bits of the library's own
rounding to nearest. Two things differ from the library. Activations are not quantized in forward (weights are exact; a
plan notes it). A scale that is stored in a narrower dtype than the model is loaded in is widened to that one.

A scale of the whole tensor depends on all rows, so rows are passed on as they are, with the range of each, and every
rank quantizes its own part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distquant.config import CompressedTensorsConfig, ModuleSelection, torch_dtype
from distquant.config.quantization_group import matches
from distquant.errors import Problem, listed
from distquant.kernels.protocol import Kernels
from distquant.model.description import Linear, ModelDescription
from distquant.model.module_names import matches_any
from distquant.quantization.codec import Encoder, Stream
from distquant.quantization.linear.float8_matmul import Float8Kernel, Float8Multiplier, Float8Rows, float8_rows_matmul
from distquant.quantization.methods.compressed_tensors.components import (
    GROUPS,
    SHAPE,
    by_row,
    check_of,
    check_values,
    dtypes_of,
    unpacked,
    with_library_shapes,
)
from distquant.quantization.methods.compressed_tensors.rounding import quantized, ranges, scales_of, to_words
from distquant.quantization.methods.compressed_tensors.storage import WORD, Storage, storages, target_of
from distquant.quantization.module_selection import disagreements, first_expert_name, is_stack, members
from distquant.quantization.registry import register
from distquant.quantization.scheme import Context
from distquant.quantization.stored_checks import OTHER_CHECKPOINT, misshapen, wrong_dtypes
from distquant.quantization.stored_values import Check
from distquant.quantization.weight_only import WeightOnlyScheme, carry_unused
from distquant.sharding.layout import ALL, Component, Layout
from distquant.sharding.shard import Shard
from distquant.sharding.tally import WHOLE_ROW

BESIDE = ("weight_scale", "weight_zero_point", SHAPE, GROUPS)
ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")


@register
class CompressedTensorsScheme(WeightOnlyScheme, Encoder, Float8Multiplier):
    """Weights as compressed-tensors stores them, dequantized in forward."""

    name = "compressed-tensors"
    config_class = CompressedTensorsConfig
    suffixes: ClassVar[Mapping[str, str]] = {name: name for name in ("weight_packed", *BESIDE, *ACTIVATIONS)}
    form_fields: ClassVar[frozenset[str]] = frozenset({"format", "weights", "strategy", "sparsity_config"})
    of_activations: ClassVar[frozenset[str]] = frozenset(ACTIVATIONS)
    config: CompressedTensorsConfig

    # -- the configuration -----------------------------------------------------------------------------------------

    @cached_property
    def _storages(self) -> Mapping[str, Storage]:
        return storages(self.config)

    @cached_property
    def _targets(self) -> Mapping[str, str]:
        """Target -> name of its group, also of groups that leave weights alone; the last one that names it."""
        return {target: name for name, group in self.config.groups.items() for target in group.targets}

    @cached_property
    def _known(self) -> dict[str, Storage | None]:
        return {}

    def storage_of(self, module: str) -> Storage | None:
        """The storage of a linear module's weight; None where the configuration does not have it quantized."""
        names = self.names.of(first_expert_name(module))
        ignored = any(matches_any(entry, names, matches) for entry in self.config.ignore or ())
        return None if ignored else self._storage_in_group(module)

    def _storage_in_group(self, module: str) -> Storage | None:
        """The storage that a module's group gives its weight; None without a group that quantizes weights."""
        module = first_expert_name(module)
        if module not in self._known:
            group = target_of(self.names.of(module), self._targets)
            self._known[module] = None if group is None else self._storages.get(group)
        return self._known[module]

    def _would_take(self, module: str) -> bool:
        """True if a reader that knows a module by the model's name alone takes it for a quantized one."""
        ignored = any(matches(entry, module) for entry in self.config.ignore or ())
        return not ignored and target_of((module,), self._targets) in self._storages

    def can_be_stored(self, linear: Linear) -> bool:
        is_plain = is_stack(linear.name) or not linear.transposed
        return is_plain and self._storage_in_group(linear.name) is not None

    def storage(self, weight: str) -> Storage:
        """The storage of a converted weight, which the files may have quantized though it is to be ignored."""
        storage = self._storage_in_group(weight.removesuffix(".weight"))
        assert storage is not None, weight
        return storage

    def select_modules(self, description: ModelDescription) -> list[str]:
        stored = any(source.component for sources in description.sources.values() for source in sources)
        skip = description.default_skip if self.config.ignore is None and not stored else ()
        selection = ModuleSelection(include=self.config.include_modules, layers=self.config.layers)
        return [
            name
            for name, linear in description.linears.items()
            if (is_stack(name) or not linear.transposed)
            and name not in skip
            and selection.selects(name, self.matching)
            and self.storage_of(name)
        ]

    def validate(self, context: Context) -> list[Problem]:
        config, problems = self.config, super().validate(context)
        field, fix = "quantization_config", "Take a checkpoint without it, or quantize the original"
        if (config.sparsity_config or {}).get("format", "dense") != "dense":
            problems.append(Problem(f"{field}.sparsity_config", "sparse weights are not supported", fix))
        if config.transform_config:
            problems.append(Problem(f"{field}.transform_config", "transforms (rotations) are not supported", fix))
        if not self._storages:
            fix_groups = "Give a group with targets and weights"
            problems.append(Problem(f"{field}.config_groups", "no group quantizes weights", fix_groups))
        problems += disagreements(context.description, self.storage_of)
        for name, stored in self._storages.items():
            problems += stored.problems(f"{field}.config_groups.{name}", context.prequantized)
        if not context.prequantized:
            problems += listed(self._unmatched(context.description))
        return problems

    def _unmatched(self, description: ModelDescription) -> Iterator[Problem]:
        """Yields the targets that this model does not have."""
        names = [member for name in description.linears for member in members(description, name)]
        for target, group in self._targets.items():
            if not any(self.names.matching(target, name, matches) for name in names):
                where = f"quantization_config.config_groups.{group}.targets"
                yield Problem(where, f"{target!r} matches no linear module", "Name one, or write 'Linear'")

    def notes(self, converted: Iterable[str]) -> Iterator[str]:
        if self.config.kv_cache_scheme is not None:
            yield "not applied: kv_cache_scheme, the cache stays as the model has it"
        with_activations = [
            name for name in converted if (s := self._storage_in_group(name)) and (s.inputs or s.outputs)
        ]
        if with_activations:
            yield f"not applied: quantization of activations, in {len(with_activations)} linear modules"

    def group_size(self, name: str, shape: tuple[int, ...]) -> int | None:
        stored = self.storage(name)
        width = stored.tile[1]
        return width if stored.weights.scope == "group" and width != ALL else None

    def check_weight(self, name: str, shape: tuple[int, ...]) -> list[Problem]:
        stored = self.storage(name)
        bits, problems = stored.weights.num_bits, []
        if stored.packed and WORD % bits:
            rows = stored.packed_zero and not stored.weights.symmetric and shape[0] % WORD
            if shape[1] % WORD or rows:
                fault = f"{list(shape)} in {bits} bits does not fill whole words: {WORD} values are {bits} of them"
                problems.append(Problem(name, fault, f"Only multiples of {WORD} are supported with {bits} bits"))
        return problems

    def check_dtypes(self, name: str, dtypes: dict[str, str]) -> list[Problem]:
        return wrong_dtypes(name, dtypes, dtypes_of(self.storage(name), dtypes))

    def value_check(self, name: str, component: str) -> Check | None:
        return check_of(self.storage(name), component)

    def check_stored(self, name: str, shape: tuple[int, ...], stored: dict[str, tuple[int, ...]]) -> list[Problem]:
        problems = [*self.check_weight(name, shape), *super().check_stored(name, shape, stored)]
        storage, group = self.storage(name), self.group_size(name, shape)
        if group and shape[1] % group:
            fault = f"in_features {shape[1]} is not a multiple of group_size={group}"
            problems.append(Problem(name, fault, OTHER_CHECKPOINT))
        for component, expected in ((SHAPE, (len(shape),)), (GROUPS, shape[1:])):
            if component in stored and stored[component] != expected:
                problems.append(misshapen(name, component, stored[component], expected))
        known = {component.name for component in storage.components("float32")}.union(BESIDE)
        if self.config.kv_cache_scheme is not None:  # older files keep the cache's scales at k_proj and v_proj
            known.update(ACTIVATIONS[2:])
        for extra in sorted(stored.keys() - known):
            fault = f"the checkpoint stores {extra or 'weight'}, which {storage.format!r} and its group do not explain"
            problems.append(Problem(name, fault, OTHER_CHECKPOINT))
        return problems

    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        return Layout(self.storage(name).components(dtype))

    def shard_nbytes(self, shard: Shard) -> int:
        return super().shard_nbytes(shard) + (2 * torch.int64.itemsize if self.storage(shard.name).packed else 0)

    def encoded_components(self, name: str, shape: tuple[int, int], dtype: str) -> tuple[Component, ...]:
        stored = self.storage(name)
        if stored.weights.scope == "tensor":
            bounds = (Component(name=part, dtype=dtype, block_shape=(1, ALL)) for part in ("low", "high"))
            return Component(name="", dtype=dtype), *bounds
        zero = Component(name="weight_zero_point", dtype="int8", block_shape=stored.tile)
        return tuple(zero if c.name == zero.name else c for c in stored.components(dtype))

    def replicated_components(self, shard: Shard) -> frozenset[str]:
        return frozenset(("low", "high") if self.storage(shard.name).weights.scope == "tensor" else ())

    # -- codec -----------------------------------------------------------------------------------------------------

    def encode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Kernels) -> None:
        stored, count = self.storage(name), len(rows)
        args, tile = stored.weights, stored.tile
        if args.scope == "tensor":
            out[""].view(rows.shape).copy_(rows)
            for part, bounds in zip(("low", "high"), ranges(rows, (1, ALL)), strict=True):
                out[part].copy_(bounds.view(-1))
            return
        scale, zero = out["weight_scale"], out.get("weight_zero_point")
        if not stored.floating and args.scope != "block":
            width = rows.shape[1] if tile[1] == ALL else tile[1]
            zeros = None if zero is None else zero.view(count, -1)
            codes = None if stored.packed else out[""].view(rows.shape)
            codes, *_ = ops.quantize_groups(
                rows, width, args.num_bits, args.symmetric, codes=codes, scale=scale.view(count, -1), zero=zeros
            )
        else:
            low, high = ranges(rows, tile)
            scales, zeros = scales_of(low, high, args)
            codes = quantized(rows, scales, zeros, tile, args)
            scale.copy_(scales.view(-1))
            if zero is not None and zeros is not None:
                zero.copy_(zeros.view(-1))
            if not stored.packed:
                out[""].view(rows.shape).copy_(codes)
        if stored.packed:
            out["weight_packed"].copy_(to_words(codes, args.num_bits).view(-1))

    def pack(self, shard: Shard, parts: dict[str, Tensor], ops: Kernels) -> dict[str, Tensor]:
        stored, (rows, columns) = self.storage(shard.name), shard.local_shape
        args = stored.weights
        if args.scope == "tensor":
            low, high = parts["low"].amin().view(1, 1), parts["high"].amax().view(1, 1)
            scale, zero = scales_of(low, high, args)
            codes = quantized(parts[""].view(rows, columns), scale, zero, stored.tile, args)
            words = to_words(codes, args.num_bits) if stored.packed else codes
            components = {stored.codes: words, "weight_scale": scale}
            if zero is not None:
                components["weight_zero_point"] = zero
        else:
            zero = parts.pop("weight_zero_point", None)
            if zero is not None:
                zero = zero.view(-(-rows // stored.tile[0]), -1)
                words = to_words(zero.T.contiguous(), args.num_bits).T.contiguous() if stored.packed_zero else zero
                parts["weight_zero_point"] = words
            components = self.shaped(shard, parts)
        return self._with_shape(shard, with_library_shapes(stored, components))

    def pack_prequantized(
        self, shard: Shard, parts: dict[str, Tensor], replicated: frozenset[str]
    ) -> dict[str, Tensor]:
        stored, dtype = self.storage(shard.name), torch_dtype(shard.dtype)
        check_values(stored, shard, parts)
        components = with_library_shapes(stored, self.shaped(shard, parts))
        for name in (name for name in components if name.endswith("_scale")):
            scale = components[name]
            if scale.dtype != dtype and torch.promote_types(scale.dtype, dtype) == dtype:
                components[name] = scale.to(dtype)
        return self._with_shape(shard, components)

    def _with_shape(self, shard: Shard, components: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds the `weight_shape` that packed codes have beside them."""
        if self.storage(shard.name).packed:
            device = components["weight_scale"].device
            components[SHAPE] = torch.tensor(shard.local_shape, dtype=torch.int64, device=device)
        return components

    def dequantize(self, shard: Shard, components: Mapping[str, Tensor], dtype: torch.dtype, ops: Kernels) -> Tensor:
        stored, shape = self.storage(shard.name), shard.local_shape
        codes, scale, zero = unpacked(stored, shape, components)
        rows, columns = (None if side == ALL else side for side in stored.tile)
        if stored.floating:
            return ops.dequantize_fp8(codes, scale.float(), (rows, columns), dtype)
        scale, zero = by_row(scale, stored, shape), None if zero is None else by_row(zero, stored, shape)
        return ops.dequantize_groups(codes, scale, zero, columns or max(shape[1], 1), dtype)

    def float8_kernel(self, name: str) -> Float8Kernel | None:
        return Float8Kernel.SCALED_MM if self.storage(name).by_rows_in_float8 else None

    def float8_matmul(self, shard: Shard, components: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return float8_rows_matmul(x, Float8Rows(components[""], components["weight_scale"].float().view(-1, 1)))

    def fingerprint_streams(self, shard: Shard, components: Mapping[str, Tensor]) -> Iterable[Stream]:
        stored, shape = self.storage(shard.name), shard.local_shape
        codes, scale, zero = unpacked(stored, shape, components)
        width = WHOLE_ROW if stored.tile[1] == ALL else stored.tile[1]
        yield "code", codes, 1
        yield "scale", by_row(scale.float(), stored, shape), width
        if zero is not None:
            yield "zero", by_row(zero, stored, shape), width
        for name in stored.statics:
            yield name, components[name].float().view(1, 1).expand(shape[0], 1), WHOLE_ROW

    # -- modules ---------------------------------------------------------------------------------------------------

    def module(self, linear: nn.Module, shard: Shard) -> nn.Module:
        module: Any = super().module(linear, shard)
        storage = self.storage(shard.name)
        module.take(with_library_shapes(storage, module.components))
        if storage.packed:
            module.take({SHAPE: torch.empty(2, dtype=torch.int64, device="meta")})
        return module

    def finish_model(self, model: Any) -> None:
        """Sets what `from_pretrained` leaves on a model; without the library, the configuration as a dict."""
        from transformers.utils import is_compressed_tensors_available
        from transformers.utils.quantization_config import CompressedTensorsConfig as Theirs

        from distquant.quantization.quantizer import Quantizer

        # The library refuses what it does not know inside of groups.
        recorded = {key: value for key, value in self.config.recorded.items() if "." not in key}
        known = replace(self.config, recorded=recorded) if is_compressed_tensors_available() else self.config
        written = {**known.to_dict(), "quantization_status": "compressed"}
        written["config_groups"] = {
            name: {**group, "format": self._storages[name].format} if name in self._storages else group
            for name, group in written["config_groups"].items()
        }
        if written.get("format") in ("dense", "fakequant"):
            formats = {stored.format for stored in self._storages.values()}
            written["format"] = formats.pop() if len(formats) == 1 else "mixed-precision"
        left = (name for name, module in model.named_modules() if type(module) is nn.Linear and self._would_take(name))
        written["ignore"] = list(dict.fromkeys((*(self.config.ignore or ()), *left)))
        available = is_compressed_tensors_available()
        model.config.quantization_config = Theirs.from_dict(written) if available else written
        if available:
            carry_unused(self.config, model.config.quantization_config)
        model.hf_quantizer = Quantizer(model.config.quantization_config, self.unsaved(model) is None)
        model.is_quantized, model.quantization_method = True, "compressed-tensors"
