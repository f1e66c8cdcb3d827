"""What to know of a plan though nothing is wrong: what was dropped, left, replicated, and what it costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from distquant.config.resolve import is_known
from distquant.environment import format_bytes
from distquant.planning.expert_parallel import ALL_REDUCE, DISPATCH, first_expert
from distquant.planning.load_plan import TensorPlan
from distquant.planning.plan_builder import Draft
from distquant.quantization import Shard, config_classes
from distquant.sharding.layout import DTYPE_BYTES

NAMED = 3
"""Names that a note lists."""


def notes_on(draft: Draft) -> Iterator[str]:
    """All notes on a finished draft."""
    yield from _skipped(draft)
    if draft.scheme.delegated:
        sizes = "as they are stored" if draft.prequantized else "before quantization"
        yield f"DELEGATED: transformers loads the model with its own quantizer; sizes are {sizes}, bits are its own"
    unexpected = draft.description.unexpected
    if unexpected:
        yield f"dropped: {len(unexpected)} checkpoint tensors that the model lacks ({_some(unexpected)})"
    if draft.dequantize:
        yield f"dequantized: {len(draft.converted)} linear modules that are stored quantized are loaded as they mean"
    if draft.scheme.name != "none":
        yield from _left_unquantized(draft)
    yield from draft.scheme.notes(draft.converted)
    yield from _experts(draft)
    yield from _replicated(draft)
    if draft.scheme.name != "none" and not draft.dequantize:
        yield from _exactness(draft)
        yield from _entire(draft)


def _experts(draft: Draft) -> Iterator[str]:
    """Experts that are neither quantized nor dealt out, and how tokens reach those that are."""
    description, mesh = draft.description, draft.mesh
    left = [name for name in description.experts if name not in draft.stacked]
    if left or description.unknown_experts:
        names = {*left, *description.unknown_experts}
        kept = "left unquantized and whole on every rank" if draft.scheme.name != "none" else "whole on every rank"
        yield f"{kept}: {len(names)} modules of fused experts, {format_bytes(_nbytes(draft, names))} each rank"
    if mesh.ep > 1:
        yield f"tokens reach experts by {draft.dispatch}: {DISPATCH[draft.dispatch]}"
    elif draft.dispatch != ALL_REDUCE:
        yield f"of no consequence: dispatch {draft.dispatch!r}, for no experts are dealt out (ep=1)"
    whole = [name for name, shard in draft.parallel.experts.items() if shard.partition is None]
    if mesh.tp > 1 and whole:
        yield f"replicated: the experts of {len(whole)} modules are not cut inside, each rank of tp holds its own whole"


def _skipped(draft: Draft) -> Iterator[str]:
    """What leaving out the checkpoint's method means."""
    if draft.skipped is None:
        return
    method = draft.skipped["quant_method"]
    told = f"SKIPPED: no scheme for the checkpoint's method {method!r} is known, it is left out"
    if is_known(draft.skipped, config_classes()):
        told = (
            f"SKIPPED: the checkpoint's method {method!r} is not known for converted weights (experts), it is left out"
        )
    if not draft.kept.weights:
        yield f"{told}; no weight is stored quantized"
        return
    dtypes = Counter(draft.description.params[name].dtype for name in draft.kept.weights)
    stored = ", ".join(f"{count:,} as {dtype}" for dtype, count in dtypes.most_common())
    yield f"{told}. Weights are planned as they are stored ({stored}), which can be read but not loaded"
    if draft.kept.beside:
        tensors = draft.checkpoint.tensors
        size = format_bytes(sum(tensors[name].nbytes for name in draft.kept.beside))
        kinds = Counter(name.rpartition(".")[2] for name in draft.kept.beside)
        names = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
        yield f"left out beside those weights: {names}; {size}, not in the memory table"


def _left_unquantized(draft: Draft) -> Iterator[str]:
    if draft.offloaded:
        what = f"left unquantized on cpu or disk: {len(draft.offloaded)} linear modules"
        yield f"{what} (llm_int8_enable_fp32_cpu_offload)"
    done = draft.offloaded.union(draft.converted)
    left = [name for name in draft.description.linears if name not in done]
    loaded = [name for name in left if f"{name}.weight" in draft.description.params]
    if loaded:
        yield f"left unquantized: {len(loaded)} linear modules ({_some(loaded)})"
    tied = [name for name in left if f"{name}.weight" in draft.description.tied]
    if tied:
        yield f"left unquantized: {_some(tied)}, tied to an embedding"


def _replicated(draft: Draft) -> Iterator[str]:
    parallel = draft.parallel
    if parallel.replicated:
        size = format_bytes(_nbytes(draft, set(parallel.replicated)))
        cost = f"{len(parallel.replicated)} modules, {size} before quantization on each further rank"
        yield f"replicated: {cost}: {'; '.join(sorted(set(parallel.replicated.values()))[:NAMED])}"
    for key, heads in parallel.heads.items():
        if heads.kv.repeated:
            layers = sum(attention.heads == key for attention in parallel.attentions.values())
            yield f"repeated: {heads.kv.repeated} kv heads in each of {layers} layers, counted once in the fingerprint"


def _exactness(draft: Draft) -> Iterator[str]:
    """What exact statistics and repeated rows cost over the uncut layout, summed over ranks."""
    extra = 0
    for tensor, times in draft.alike():
        if tensor.scheme != "none" and tensor.partition:
            one = first_expert(tensor)
            number = tensor.shape[0] if tensor.experts is not None else 1
            whole = Shard(one.name, (one.shape[0], one.shape[1]), one.dtype)
            parts = (draft.local(one, tp)[1] for tp in range(draft.mesh.tp))
            extra += (sum(parts) - draft.scheme.shard_nbytes(whole)) * times * number
    if extra > 0:
        yield f"exact statistics and repeated rows cost {format_bytes(extra)} over all ranks of tp"


def _entire(draft: Draft) -> Iterator[str]:
    """What it costs that weights are quantized whole, and that packed ones have no slices."""
    found = draft.whole_weight_workspace()
    if found:
        tensor, nbytes = max(found, key=lambda pair: pair[1])
        what = f"quantized whole by one rank of a node: {len(found)} weights; the largest ({tensor.name}) takes"
        yield f"{what} {format_bytes(nbytes)} while it is, counted as staging"
    uncut = [t for t in draft.tensors if t.scheme != "none" and t.partition and draft.prequantized]
    whole = [t for t in uncut if _goes_whole(draft, t)]
    if whole:
        yield (
            f"taken whole by every rank, which keeps its part: {len(whole)} weights (their packed form has no slices)"
        )


def _goes_whole(draft: Draft, tensor: TensorPlan) -> bool:
    """Whether every rank gets all codes of a stored weight, because they have no slices."""
    if any(source.component in draft.scheme.unsliced for source in tensor.sources):
        return True
    one = first_expert(tensor)
    return any(c.replicated and not c.name for c in draft.scheme.layout(one.name, one.shape, one.dtype).components)


def _nbytes(draft: Draft, modules: set[str]) -> int:
    """Bytes of whole modules in the dtype they are loaded in."""

    def size(tensor: TensorPlan) -> int:
        return math.prod(tensor.shape) * DTYPE_BYTES.get(tensor.dtype, 4)

    return sum(size(tensor) for tensor in draft.tensors if tensor.name.rpartition(".")[0] in modules)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (" ..." if len(names) > NAMED else "")
