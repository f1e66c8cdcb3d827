"""Notes on a plan: what a user may not expect though nothing is wrong, and what it costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from distquant.config.resolve import is_known
from distquant.dtypes import DTYPE_BYTES
from distquant.model.description import wildcard
from distquant.options import ALL_REDUCE, DISPATCH
from distquant.planning.dropped_biases import dropped_biases
from distquant.planning.expert_parallel import first_expert
from distquant.planning.load_plan import TensorPlan
from distquant.planning.plan_builder import Partitioned
from distquant.quantization import Shard, config_classes
from distquant.units import format_bytes

LISTED = 3
"""Names that a note lists."""


def notes_on(partitioned: Partitioned) -> Iterator[str]:
    """Yields all notes; a skipped method comes first, because such a plan cannot be loaded."""
    scheme = partitioned.scheme
    yield from _skipped_method(partitioned)
    if scheme.delegated:
        sizes = "as they are stored" if partitioned.prequantized else "before quantization"
        yield f"DELEGATED: transformers loads the model with its own quantizer; sizes are {sizes}, bits are its own"
    yield from partitioned.checkpoint.notes
    if absent := partitioned.checkpoint.absent:
        names = _first(list(absent))
        yield f"not there: {len(absent)} tensors that the index lists, and the model does not need ({names})"
    unexpected = partitioned.description.unexpected
    if unexpected:
        yield f"dropped: {len(unexpected)} checkpoint tensors that the model lacks ({_first(unexpected)})"
    if partitioned.prequantized and (biases := dropped_biases(partitioned.tensors, partitioned.checkpoint.tensors)):
        yield f"assumed: {len(biases)} biases that are dropped are zero, which a load checks ({_first(biases)})"
    if partitioned.dequantize:
        yield f"dequantized: {len(partitioned.converted)} linear modules that are stored quantized become ordinary ones"
    yield from partitioned.otherwise
    if partitioned.prequantized and (unused := scheme.config.unused_keys):
        yield f"not used: keys of the checkpoint's quantization_config: {', '.join(unused)}; kept, and saved again"
    if scheme.name != "none":
        yield from _left_unquantized(partitioned)
    yield from scheme.notes(partitioned.converted)
    yield from _forced_dtypes(partitioned)
    yield from _experts(partitioned)
    yield from _replicated(partitioned)
    if scheme.name != "none" and not partitioned.dequantize:
        yield from _exactness_cost(partitioned)
        yield from _whole_weights(partitioned)


def _skipped_method(partitioned: Partitioned) -> Iterator[str]:
    """Yields the consequences of leaving out the checkpoint's method."""
    if partitioned.skipped is None:
        return
    description, kept = partitioned.description, partitioned.kept
    method = partitioned.skipped["quant_method"]
    if is_known(partitioned.skipped, config_classes()):
        note = f"SKIPPED: the checkpoint's method {method!r} is not supported for converted weights (experts)"
    else:
        note = f"SKIPPED: no scheme for the checkpoint's method {method!r} is known"
    if not kept.weights:
        yield f"{note}, so it is left out; no weight is stored quantized"
        return
    dtypes = Counter(description.params[name].dtype for name in kept.weights)
    stored = ", ".join(f"{count:,} as {dtype}" for dtype, count in dtypes.most_common())
    yield (
        f"{note}, so it is left out. Weights are planned as they are stored ({stored}); "
        "such a plan can be read but not loaded"
    )
    if kept.beside:
        tensors = partitioned.checkpoint.tensors
        size = format_bytes(sum(tensors[name].nbytes for name in kept.beside))
        kinds = Counter(name.rpartition(".")[2] for name in kept.beside)
        names = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
        yield f"left out beside those weights: {names}; {size}, not in the memory table"


def _left_unquantized(partitioned: Partitioned) -> Iterator[str]:
    description, offloaded = partitioned.description, partitioned.offloaded
    if offloaded:
        modules = f"{len(offloaded)} linear modules"
        yield f"left unquantized on cpu or disk: {modules} (llm_int8_enable_fp32_cpu_offload)"
    accounted = offloaded.union(partitioned.converted)
    rest = [name for name in description.linears if name not in accounted]
    loaded = [name for name in rest if f"{name}.weight" in description.params]
    if loaded:
        yield f"left unquantized: {len(loaded)} linear modules ({_first(loaded)})"
    # A tied weight is not a parameter of its own in the description, so it is not among those loaded.
    tied = [name for name in rest if f"{name}.weight" in description.tied]
    if tied:
        yield f"left unquantized: {_first(tied)}, tied to an embedding"


def _forced_dtypes(partitioned: Partitioned) -> Iterator[str]:
    """Yields the unquantized tensors that are loaded in another dtype than the model's, and why; one note a kind."""
    forced = partitioned.description.forced
    kinds: Counter[tuple[str, str, str]] = Counter()
    for tensor in partitioned.tensors:
        if tensor.name in forced and (tensor.scheme == "none" or partitioned.dequantize):
            kinds[wildcard(tensor.name), tensor.dtype, forced[tensor.name]] += 1
    for (name, dtype, reason), count in kinds.items():
        yield f"kept in {dtype}: {count} tensor{'s' * (count > 1)} ({name}), {reason}"


def _experts(partitioned: Partitioned) -> Iterator[str]:
    """Yields notes on experts that stay as they are, and on the way of tokens to the others."""
    description, mesh, dispatch = partitioned.description, partitioned.mesh, partitioned.dispatch
    unstacked = {name for name in description.experts if name not in partitioned.stacked}
    unstacked.update(description.unknown_experts)
    if unstacked:
        unquantized = "left unquantized and " if partitioned.scheme.name != "none" else ""
        size = format_bytes(_whole_nbytes(partitioned, unstacked))
        yield f"{unquantized}replicated: {len(unstacked)} modules of fused experts, {size} on each rank"
    if mesh.ep > 1:
        yield f"tokens reach experts by {dispatch}: {DISPATCH[dispatch]}"
    elif dispatch != ALL_REDUCE:
        yield f"without effect: dispatch {dispatch!r}, because experts are not distributed (ep=1)"
    undivided = [name for name, shard in partitioned.parallel.experts.items() if shard.partition is None]
    if mesh.tp > 1 and undivided:
        yield f"replicated over tp: the experts of {len(undivided)} modules, which are not partitioned inside"


def _replicated(partitioned: Partitioned) -> Iterator[str]:
    parallel = partitioned.parallel
    if parallel.replicated:
        size = format_bytes(_whole_nbytes(partitioned, set(parallel.replicated)))
        cost = f"{len(parallel.replicated)} modules, {size} before quantization on each further rank"
        yield f"replicated: {cost}: {'; '.join(sorted(set(parallel.replicated.values()))[:LISTED])}"
    for key, heads in parallel.heads.items():
        if heads.kv.repeated:
            layers = sum(attention.heads == key for attention in parallel.attentions.values())
            yield f"repeated: {heads.kv.repeated} kv heads in each of {layers} layers, counted once in the fingerprint"


def _exactness_cost(partitioned: Partitioned) -> Iterator[str]:
    """Yields the bytes that exact statistics and repeated rows add to an undivided weight, over all ranks of tp."""
    extra = 0
    for tensor, times in partitioned.kinds():
        if tensor.scheme != "none" and tensor.partition:
            # A stack is counted as one of its experts, times their number.
            one = first_expert(tensor)
            experts = tensor.shape[0] if tensor.experts is not None else 1
            undivided = Shard(one.name, (one.shape[0], one.shape[1]), one.dtype)
            shards = sum(partitioned.local_size(one, tp)[1] for tp in range(partitioned.mesh.tp))
            extra += (shards - partitioned.scheme.shard_nbytes(undivided)) * times * experts
    if extra > 0:
        yield f"exact statistics and repeated rows cost {format_bytes(extra)} over all ranks of tp"


def _whole_weights(partitioned: Partitioned) -> Iterator[str]:
    """Yields the cost of weights that are quantized as a whole, and of stored ones that have no slices."""
    workspaces = partitioned.whole_weight_workspace()
    if workspaces:
        tensor, nbytes = max(workspaces, key=lambda pair: pair[1])
        weights = f"{len(workspaces)} weights; the largest ({tensor.name}) takes {format_bytes(nbytes)}"
        yield f"quantized whole by one rank of a node: {weights} while it is quantized, counted with the load buffer"
    if partitioned.prequantized:
        divided = [tensor for tensor in partitioned.tensors if tensor.scheme != "none" and tensor.partition]
        unsliced = [tensor for tensor in divided if _is_unsliced(partitioned, tensor)]
        if unsliced:
            weights = f"{len(unsliced)} weights (their packed form has no slices)"
            yield f"taken whole by every rank, which keeps its part: {weights}"


def _is_unsliced(partitioned: Partitioned, tensor: TensorPlan) -> bool:
    """Returns True if every rank gets all codes of a stored weight, because they have no slices."""
    scheme = partitioned.scheme
    if any(source.component in scheme.unsliced for source in tensor.sources):
        return True
    one = first_expert(tensor)
    # The codes are the component without a name; replicated scales alone are small and not worth a note.
    return any(c.replicated and not c.name for c in scheme.layout(one.name, one.shape, one.dtype).components)


def _whole_nbytes(partitioned: Partitioned, modules: set[str]) -> int:
    """Returns the bytes of undivided modules in the dtype they are loaded in."""

    def nbytes(tensor: TensorPlan) -> int:
        return math.prod(tensor.shape) * DTYPE_BYTES.get(tensor.dtype, 4)

    return sum(nbytes(tensor) for tensor in partitioned.tensors if tensor.name.rpartition(".")[0] in modules)


def _first(names: Sequence[str]) -> str:
    """Returns the first names, and a mark if there are more."""
    return ", ".join(names[:LISTED]) + (" ..." if len(names) > LISTED else "")
