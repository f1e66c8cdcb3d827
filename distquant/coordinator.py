"""Decides everything, once: resolves the configuration, checks it all, cuts the model, and freezes a `LoadPlan`.

Reads configs and headers only. Touches no weight, no device and no process group. Every problem that can be known from
them is raised together, before a weight byte moves.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from distquant.checkpoint import Checkpoint, open_checkpoint
from distquant.config import QuantizationConfig, detect, merge, parse
from distquant.errors import InputError, Problems
from distquant.facts import Facts, format_bytes, parse_bytes
from distquant.layout import DTYPE_BYTES, Layout, plain
from distquant.mesh import Mesh
from distquant.placement import check_memory, infer_device_map, place_of, read_memory
from distquant.planning.load_plan import LoadPlan, ModuleShard, RankMemory, TensorPlan
from distquant.planning.parallel import (
    COLWISE,
    COLWISE_GATHER,
    GRAD_REDUCE,
    ROWWISE,
    ROWWISE_SPLIT,
    VOCAB_EMBEDDING,
    ParallelPlan,
    rewrite_tp_plan,
)
from distquant.schemes import Context, Scheme, Shard, config_classes, scheme_for
from distquant.skeleton import Skeleton, build, build_skeleton

DEFAULT_STAGING = "512MiB"

CUT_DIM = {COLWISE: 0, COLWISE_GATHER: 0, VOCAB_EMBEDDING: 0, ROWWISE: 1, ROWWISE_SPLIT: 1}
"""The weight's dim that each style cuts."""

TOLD_MISSING = 20
"""Missing parameters that are named; of more, the number is told."""

FLOATS = {"F64", "F32", "F16", "BF16"}
"""Checkpoint dtypes that need no scheme to be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked for, as given; `make_plan` checks all of it."""

    model: str | os.PathLike[str]
    quantization_config: Any = None
    mesh: Any = None
    device_map: Any = None
    max_memory: Any = None
    dtype: Any = None
    staging: str | int = DEFAULT_STAGING
    trust_remote_code: bool = False
    revision: str | None = None


@contextmanager
def _collected(problems: Problems) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        problems.extend(error.problems)


def make_plan(request: Request, facts: Facts) -> LoadPlan:
    """Plans a load; raises `InputError` with every problem found."""
    problems = Problems()
    mesh, staging, dtype, user = Mesh(), 0, None, None
    with _collected(problems):
        mesh = Mesh.parse(request.mesh)
    with _collected(problems):
        staging = parse_bytes(request.staging, "staging")
    with _collected(problems):
        dtype = _dtype_name(request.dtype)
    with _collected(problems):
        _check_sizes(request)
    with _collected(problems):
        user = parse(request.quantization_config, config_classes())
    checkpoint = None
    with _collected(problems):
        checkpoint = open_checkpoint(request.model, revision=request.revision)
    if checkpoint is None:
        problems.raise_if_any()
        raise AssertionError("open_checkpoint neither returned nor raised")
    merged = None
    with _collected(problems):
        stored = detect(checkpoint.config)
        merged = merge(parse(stored, config_classes()) if stored else None, user)
    if merged is None:
        problems.raise_if_any()
        raise AssertionError("merge neither returned nor raised")
    return _Planner(request, facts, mesh, staging, checkpoint, merged.config, merged.prequantized, problems).plan(dtype)


class _Planner:
    def __init__(
        self,
        request: Request,
        facts: Facts,
        mesh: Mesh,
        staging: int,
        checkpoint: Checkpoint,
        config: QuantizationConfig,
        prequantized: bool,
        problems: Problems,
    ):
        self.request, self.facts, self.mesh, self.staging = request, facts, mesh, staging
        self.checkpoint, self.config, self.prequantized, self.problems = checkpoint, config, prequantized, problems
        self.scheme: Scheme = scheme_for(config)
        self.notes: list[str] = []
        self.offloaded: set[str] = set()
        self.understood = not problems
        """Whether the request could be read whole; sizes that follow from a guess would mislead."""
        self.check_at_load: list[str] = []

    def plan(self, dtype: str | None) -> LoadPlan:
        trust = self.request.trust_remote_code
        try:
            model = build(self.checkpoint.path, dtype, trust_remote_code=trust)
        except InputError as error:
            raise InputError([*self.problems, *error.problems]) from error
        shapes = {name: info.shape for name, info in self.checkpoint.tensors.items()}
        suffixes = self.scheme.suffixes if self.prequantized else {}
        skeleton = build_skeleton(model, shapes, suffixes, self.problems)
        converted = self._converted(skeleton)
        device_map = self._device_map(model, skeleton, set(converted))
        if device_map and getattr(self.config, "llm_int8_enable_fp32_cpu_offload", False):
            places = set(device_map.values())
            if places != {"cpu"}:
                self.offloaded = {name for name in converted if place_of(device_map, name) in ("cpu", "disk")}
                converted = [name for name in converted if name not in self.offloaded]
        self._check(skeleton, device_map, converted)
        parallel = self._parallel(skeleton, set(converted))
        tensors = tuple(self._tensors(skeleton, set(converted), parallel))
        memory = tuple(self._memory(tensors, parallel))
        self._check_memory(memory, device_map, tensors)
        self.problems.raise_if_any()
        self._note(skeleton, set(converted), parallel, tensors)
        return LoadPlan(
            model=str(self.checkpoint.path),
            model_type=skeleton.model_type,
            architecture=skeleton.architecture,
            mesh=self.mesh,
            dtype=str(model.dtype).removeprefix("torch."),
            quantization_config=self.config.to_dict(),
            selection=_extras(self.config),
            prequantized=self.prequantized,
            tensors=tensors,
            tied=skeleton.tied,
            cuts=parallel.cuts,
            heads=parallel.heads,
            modules=parallel.modules,
            attentions=parallel.attentions,
            converted=tuple(converted),
            rules=tuple(parallel.rules),
            notes=tuple(self.notes),
            memory=memory,
            staging=self.staging,
            device_map=device_map,
            shards=self.checkpoint.digests(),
            check_at_load=tuple(self.check_at_load),
            facts=self.facts,
            trust_remote_code=self.request.trust_remote_code,
        )

    # -- what is converted, and where it goes -----------------------------------------------------------------------

    def _converted(self, skeleton: Skeleton) -> list[str]:
        leaves = _leaves(skeleton.modules)
        if not self.prequantized:
            self.problems.extend(self.config.selection.unmatched(leaves))
        chosen = self.scheme.converts(skeleton)
        tied = [name for name in chosen if f"{name}.weight" not in skeleton.params]
        if tied:
            self.notes.append(f"left unquantized: {', '.join(tied)}, tied to a weight that is not a linear's")
        return [name for name in chosen if name not in tied]

    def _device_map(self, model: Any, skeleton: Skeleton, converted: set[str]) -> dict[str, str] | None:
        asked = self.request.device_map
        if asked is None:
            return None
        if self.mesh.size > 1:
            what = f"given together with mesh {self.mesh} ({self.mesh.size} ranks)"
            self.problems.add("device_map", what, "Use a mesh to cut the model, or a device_map in one process")
            return None

        def nbytes(name: str) -> int:
            linear = skeleton.linears[name]
            weight = skeleton.params[f"{name}.weight"]
            return self.scheme.shard_nbytes(Shard(name, (linear.out_features, linear.in_features), weight.dtype))

        sizes = {name: nbytes(name) for name in converted}
        asked = self.scheme.update_device_map(asked) if isinstance(asked, dict) else asked
        return infer_device_map(
            model, asked, self._memory_by_device(), sizes, self.scheme.adjust_max_memory, self.problems
        )

    def _limits(self, device_map: Mapping[str, str]) -> Mapping[str, int]:
        """Bytes that each device of a map may hold, as far as they are given."""
        given = self.request.max_memory
        if given is None or isinstance(given, Mapping):
            return read_memory(given) or {}
        return dict.fromkeys(set(device_map.values()) - {"disk"}, parse_bytes(given, "max_memory"))

    def _memory_by_device(self) -> Mapping[Any, Any] | None:
        """`max_memory` with one size read as that of the first device."""
        given = self.request.max_memory
        if given is None or isinstance(given, Mapping):
            return given
        return {"cpu" if self.facts.device_type == "cpu" else 0: given}

    # -- checks ----------------------------------------------------------------------------------------------------

    def _check(self, skeleton: Skeleton, device_map: Mapping[str, str] | None, converted: list[str]) -> None:
        context = Context(
            facts=self.facts,
            mesh=self.mesh,
            skeleton=skeleton,
            device_map=device_map,
            prequantized=self.prequantized,
        )
        self.problems.extend(self.scheme.validate(context))
        self._check_mesh(skeleton)
        fix = "Download the checkpoint again, or check that config.json belongs to it"
        for name in skeleton.missing[:TOLD_MISSING]:
            what = f"the checkpoint has no tensor for it (shape {list(skeleton.params[name].shape)})"
            self.problems.add(name, what, fix)
        if len(skeleton.missing) > TOLD_MISSING:
            what = f"{len(skeleton.missing) - TOLD_MISSING} more parameters have no tensor in it"
            self.problems.add(str(self.checkpoint.path), what, fix)
        self._check_devices(device_map)
        weights = {f"{name}.weight" for name in converted}
        for name in skeleton.params:
            if name in skeleton.sources:
                self._check_sources(skeleton, name, name in weights)
        if self.facts.device_type is None:
            self.check_at_load.append("device type, capability and count")
        if self.facts.memory is None and device_map is None:
            self.check_at_load.append("memory of each rank (declare it with max_memory)")

    def _check_devices(self, device_map: Mapping[str, str] | None) -> None:
        here = self.facts.device_type
        for place in sorted(set((device_map or {}).values())):
            if here is not None and place.partition(":")[0] not in ("cpu", "disk", here):
                what = f"{place!r} is given, and the devices here are of type {here!r}"
                self.problems.add("device_map", what, "Map the modules to devices that are there, or use 'auto'")

    def _check_mesh(self, skeleton: Skeleton) -> None:
        mesh, known = self.mesh, self.facts.device_count
        if mesh.ep > 1:
            rules = len(self.scheme.update_ep_plan(dict(skeleton.ep_plan)))
            kind = "has no experts"
            if skeleton.experts:
                kind = f"has an expert plan of {rules} rules, but expert parallelism comes later"
            what = f"ep={mesh.ep}, and {skeleton.architecture} {kind}"
            self.problems.add("mesh", what, "Use tp, and dp for replicas")
        if mesh.tp > 1 and not skeleton.tp_plan:
            what = f"{skeleton.architecture} has no tensor-parallel plan, tp={mesh.tp} needs one"
            self.problems.add("mesh", what, "Use tp=1, or device_map='auto' over the devices of one process")
        if known is not None and known != mesh.size and self.request.device_map is None:
            what = f"{mesh} needs {mesh.size} ranks, there are {known}"
            self.problems.add("mesh", what, f"Start {mesh.size} ranks, or give a mesh of {known}")

    def _check_sources(self, skeleton: Skeleton, name: str, quantized: bool) -> None:
        param, sources = skeleton.params[name], skeleton.sources[name]
        infos = {source.component: self.checkpoint.tensors[source.tensor] for source in sources}
        fix = "The checkpoint is of another model or method; check config.json"
        if quantized and self.prequantized:
            stored = {component: info.shape for component, info in infos.items()}
            self.problems.extend(self.scheme.check_stored(name, param.shape, stored))
            return
        extra = sorted(component for component in infos if component)
        if extra:
            self.problems.add(name, f"is stored quantized ({', '.join(extra)}), the config leaves it unquantized", fix)
            return
        for source in sources:
            info = self.checkpoint.tensors[source.tensor]
            if info.dtype not in FLOATS and DTYPE_BYTES.get(param.dtype, 0) and param.dtype.startswith(("float", "bf")):
                what = f"{source.tensor} is stored as {info.dtype}, which no quantization in config.json explains"
                self.problems.add(name, what, fix)
            if source.offset is not None and len(source.offset) > 1 and source.offset[-1] != 0:
                what = f"{source.tensor} is concatenated along the input dim, which cannot be streamed"
                self.problems.add(name, what, "Convert the checkpoint with save_pretrained first")
        whole = len(sources) == 1 and sources[0].offset is None and sources[0].take is None
        shape = infos[""].shape
        count = sum(_taken(source, self.checkpoint.tensors[source.tensor].shape) for source in sources)
        if (whole and shape != param.shape) or count != math.prod(param.shape):
            what = f"the checkpoint has shape {list(shape)}, the model {list(param.shape)}"
            self.problems.add(name, what, fix)
        elif quantized:
            self.problems.extend(self.scheme.check_weight(name, param.shape))

    # -- cutting ---------------------------------------------------------------------------------------------------

    def _parallel(self, skeleton: Skeleton, converted: set[str]) -> ParallelPlan:
        if self.mesh.tp == 1 or not skeleton.tp_plan:
            return ParallelPlan()

        @cache
        def layout(shape: tuple[int, int], dtype: str, quantized: bool) -> Layout:
            return self.scheme.layout(shape, dtype) if quantized else plain(dtype)

        def layout_of(name: str) -> Layout:
            linear, weight = skeleton.linears[name], skeleton.params.get(f"{name}.weight")
            dtype = weight.dtype if weight else "float32"
            return layout((linear.out_features, linear.in_features), dtype, name in converted)

        tp_plan = self.scheme.update_tp_plan(dict(skeleton.tp_plan))
        return rewrite_tp_plan(skeleton, tp_plan, self.mesh.tp, layout_of)

    def _tensors(self, skeleton: Skeleton, converted: set[str], parallel: ParallelPlan) -> Iterator[TensorPlan]:
        order = {name: i for i, name in enumerate(self.checkpoint.tensors)}

        def place(name: str) -> int:
            return min((order[source.tensor] for source in skeleton.sources[name]), default=0)

        for name in sorted(skeleton.sources, key=place):
            param, (owner, _, leaf) = skeleton.params[name], name.rpartition(".")
            shard = parallel.modules.get(owner) or self._tied_shard(name, skeleton, parallel)
            dim = _cut_dim(shard, leaf)
            linear = skeleton.linears.get(owner)
            turned = owner in converted and leaf == "weight" and linear is not None and linear.transposed
            shape = param.shape[::-1] if turned else param.shape
            scheme = self.scheme.name if owner in converted and leaf == "weight" else "none"
            cut = shard.cut if shard is not None and dim is not None else None
            turned = turned and not self.prequantized
            yield TensorPlan(name, shape, param.dtype, scheme, skeleton.sources[name], dim, cut, turned)

    def _tied_shard(self, name: str, skeleton: Skeleton, parallel: ParallelPlan) -> ModuleShard | None:
        """The shard of a module whose parameter is tied to this one (its own module may have no rule)."""
        sharers = (target.rpartition(".")[0] for target, source in skeleton.tied.items() if source == name)
        return next((parallel.modules[module] for module in sharers if module in parallel.modules), None)

    # -- memory ----------------------------------------------------------------------------------------------------

    def _memory(self, tensors: tuple[TensorPlan, ...], parallel: ParallelPlan) -> Iterator[RankMemory]:
        item = {name: info.nbytes // max(math.prod(info.shape), 1) for name, info in self.checkpoint.tensors.items()}
        sizes: dict[Any, tuple[int, int]] = {}
        for rank in range(self.mesh.size):
            tp = self.mesh.coordinates(rank)["tp"]
            parameters = read = quantized = unquantized = 0
            for tensor in tensors:
                length = parallel.cuts[tensor.cut].length(tp) if tensor.cut else None
                key = (tensor.shape, tensor.dtype, tensor.scheme, tensor.dim, tensor.cut, tp if tensor.cut else None)
                if key not in sizes:
                    sizes[key] = self._local(tensor, parallel, tp)
                count, nbytes = sizes[key]
                parameters += count
                if tensor.scheme == "none":
                    unquantized += nbytes
                else:
                    quantized += nbytes
                if tensor.scheme != "none" and self.prequantized:
                    read += nbytes
                else:
                    whole = math.prod(tensor.shape)
                    share = 1.0 if length is None else count / max(whole, 1)
                    per_tensor = (
                        _taken(s, self.checkpoint.tensors[s.tensor].shape) * item[s.tensor] for s in tensor.sources
                    )
                    read += round(sum(per_tensor) * share)
            yield RankMemory(rank, parameters, read, quantized, unquantized, self.staging)

    def _local(self, tensor: TensorPlan, parallel: ParallelPlan, tp: int) -> tuple[int, int]:
        """Elements and bytes of one rank's part."""
        cut = parallel.cuts[tensor.cut] if tensor.cut else None
        if tensor.scheme != "none":
            out, columns = tensor.shape
            shard = Shard(tensor.name, (out, columns), tensor.dtype, tensor.dim, cut, tp)
            return math.prod(shard.local_shape), self.scheme.shard_nbytes(shard)
        count = math.prod(tensor.shape)
        if cut is not None:
            count = count // cut.size * cut.length(tp)
        return count, count * DTYPE_BYTES.get(tensor.dtype, 4)

    def _check_memory(
        self, memory: tuple[RankMemory, ...], device_map: Mapping[str, str] | None, tensors: tuple[TensorPlan, ...]
    ) -> None:
        if not self.understood or (device_map is None and self.request.device_map is not None):
            return
        if device_map is not None:
            with _collected(self.problems):
                sizes = ((tensor.name, self._local(tensor, ParallelPlan(), 0)[1]) for tensor in tensors)
                check_memory(sizes, device_map, self._limits(device_map), self.problems)
            return
        if self.facts.memory is None:
            return
        limit = self.scheme.adjust_max_memory(self.facts.memory)
        short = [row for row in memory if row.peak > limit]
        if short:
            worst = max(short, key=lambda row: row.peak)
            what = (
                f"needs {format_bytes(worst.quantized)} quantized + {format_bytes(worst.unquantized)} unquantized "
                f"+ {format_bytes(worst.staging)} staging = {format_bytes(worst.peak)}, and "
                f"{format_bytes(limit)} of {format_bytes(self.facts.memory)} ({self.facts.memory_source}) may be used"
            )
            others = f" (and {len(short) - 1} more)" if len(short) > 1 else ""
            fix = "Use more ranks, a smaller staging, fewer bits, or more memory"
            self.problems.add(f"rank {worst.rank}{others}", what, fix)

    # -- what the user should know ---------------------------------------------------------------------------------

    def _note(
        self, skeleton: Skeleton, converted: set[str], parallel: ParallelPlan, tensors: tuple[TensorPlan, ...]
    ) -> None:
        if skeleton.unexpected:
            names = ", ".join(skeleton.unexpected[:3]) + (" ..." if len(skeleton.unexpected) > 3 else "")
            self.notes.append(f"dropped: {len(skeleton.unexpected)} checkpoint tensors that the model lacks ({names})")
        if self.config.quant_method != "none":
            if self.offloaded:
                what = f"left unquantized on cpu or disk: {len(self.offloaded)} linear modules"
                self.notes.append(f"{what} (llm_int8_enable_fp32_cpu_offload)")
            kept = converted | self.offloaded
            left = [n for n in skeleton.linears if n not in kept and f"{n}.weight" in skeleton.params]
            if left:
                names = ", ".join(left[:3]) + (" ..." if len(left) > 3 else "")
                self.notes.append(f"left unquantized: {len(left)} linear modules ({names})")
        if skeleton.experts:
            size = sum(_nbytes(t) for t in tensors if t.name.rpartition(".")[0] in skeleton.experts)
            what = "left unquantized and whole on every rank: " if self.config.quant_method != "none" else "experts: "
            self.notes.append(f"{what}{len(skeleton.experts)} modules of fused experts, {format_bytes(size)} each rank")
        if parallel.replicated:
            replicated = parallel.replicated
            size = sum(_nbytes(t) for t in tensors if t.name.rpartition(".")[0] in replicated)
            reasons = sorted(set(replicated.values()))
            cost = f"{len(replicated)} modules, {format_bytes(size)} before quantization on each further rank"
            self.notes.append(f"replicated: {cost}: {'; '.join(reasons[:3])}")
        repeated = {key: heads.kv.repeated for key, heads in parallel.heads.items() if heads.kv.repeated}
        for key, count in repeated.items():
            layers = sum(attention.heads == key for attention in parallel.attentions.values())
            self.notes.append(f"repeated: {count} kv heads in each of {layers} layers, counted once in the fingerprint")
        self._note_nesting(tensors, parallel)

    def _note_nesting(self, tensors: tuple[TensorPlan, ...], parallel: ParallelPlan) -> None:
        """What exact statistics cost over the uncut layout, summed over ranks."""
        quantized = [t for t in tensors if t.scheme != "none" and t.cut]
        extra = 0
        for t in quantized:
            shape = (t.shape[0], t.shape[1])
            cut = parallel.cuts[t.cut or ""]
            whole = self.scheme.shard_nbytes(Shard(t.name, shape, t.dtype))
            parts = (
                self.scheme.shard_nbytes(Shard(t.name, shape, t.dtype, t.dim, cut, r)) for r in range(self.mesh.tp)
            )
            extra += sum(parts) - whole
        if extra > 0:
            self.notes.append(f"exact statistics and repeated rows cost {format_bytes(extra)} over all ranks of tp")


def _cut_dim(shard: ModuleShard | None, leaf: str) -> int | None:
    """The dim of a module's parameter that its style cuts; None = replicated."""
    if shard is None or shard.style == GRAD_REDUCE:
        return None
    dim = CUT_DIM[shard.style]
    if leaf == "bias":
        return 0 if dim == 0 else None
    return dim


def _taken(source: Any, shape: tuple[int, ...]) -> int:
    """Elements of a checkpoint tensor that a source takes."""
    if source.take is None:
        return math.prod(shape)
    dim, start, stop = source.take
    return math.prod(shape) // shape[dim] * (stop - start)


def _nbytes(tensor: TensorPlan) -> int:
    return math.prod(tensor.shape) * DTYPE_BYTES.get(tensor.dtype, 4)


def _leaves(modules: tuple[str, ...]) -> list[str]:
    parents = {name.rpartition(".")[0] for name in modules}
    return [name for name in modules if name not in parents]


def _extras(config: QuantizationConfig) -> dict[str, Any]:
    plain_dict = config.to_dict()
    return {key: value for key, value in config.to_dict(extras=True).items() if key not in plain_dict}


def _check_sizes(request: Request) -> None:
    """Raises `InputError` where `max_memory` is no size, or would be ignored."""
    if not isinstance(request.max_memory, Mapping):
        if request.max_memory is not None:
            parse_bytes(request.max_memory, "max_memory")
    elif request.device_map is None:
        what = f"sizes of {', '.join(map(str, request.max_memory))} are given without a device_map"
        raise InputError.one("max_memory", what, "Give one size for every rank, or device_map='auto'")


def _dtype_name(dtype: Any) -> str | None:
    if dtype is None or dtype == "auto":
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in ("bfloat16", "float16", "float32"):
        raise InputError.one("dtype", f"{dtype!r} is no dtype to load in", "Use bfloat16, float16, float32 or auto")
    return name
