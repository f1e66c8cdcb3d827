"""compressed-tensors: bits as the library's, slices that commute with dequantizing, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from absent import run_without
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import distquant as dq
from distquant.config import CompressedTensorsConfig
from distquant.kernels import reference
from distquant.kernels.choice import Kernel, choose
from distquant.quantization.methods.compressed_tensors import CompressedTensorsScheme
from distquant.quantization.methods.compressed_tensors.rounding import from_words, to_words
from distquant.quantization.methods.compressed_tensors.storage import target_of
from distquant.sharding.partition import Partition, even_partition
from distquant.sharding.shard import Shard

DATA = Path(__file__).parents[2] / "data" / "compressed_tensors"
NAME = "model.layers.0.mlp.up_proj.weight"
INT, FLOAT = {"type": "int"}, {"type": "float", "num_bits": 8}
SPARSE, ROTATED = (
    {"sparsity_config": {"format": "sparse-24-bitmask"}},
    {"transform_config": {"config_groups": {"a": 1}}},
)
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("pack-quantized", {**INT, "num_bits": 4, "strategy": "group", "group_size": 16}),
    "int4-zeros": ("pack-quantized", {**INT, "num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False}),
    "int4-rows": ("pack-quantized", {**INT, "num_bits": 4, "strategy": "channel", "symmetric": False}),
    "int8-packed": ("pack-quantized", {**INT, "num_bits": 8, "strategy": "channel", "symmetric": False}),
    "int4-tensor": ("pack-quantized", {**INT, "num_bits": 4, "strategy": "tensor", "symmetric": False}),
    "int8-rows": ("int-quantized", {**INT, "num_bits": 8, "strategy": "channel"}),
    "int8-tensor": ("naive-quantized", {**INT, "num_bits": 8, "strategy": "tensor"}),
    "int8-blocks": ("naive-quantized", {**INT, "num_bits": 8, "strategy": "block", "block_structure": [24, 16]}),
    "fp8-rows": ("float-quantized", {**FLOAT, "strategy": "channel"}),
    "fp8-tensor": ("float-quantized", {**FLOAT, "strategy": "tensor"}),
    "fp8-groups": ("naive-quantized", {**FLOAT, "strategy": "group", "group_size": 16}),
    "fp8-blocks": ("float-quantized", {**FLOAT, "strategy": "block", "block_structure": [24, 16]}),
}
"""Format and arguments of weights that are quantized on the way."""


def config(file_format: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "format": file_format}
    return {"quant_method": "compressed-tensors", "format": file_format, "config_groups": {"group_0": group}, **more}


def scheme(way: str) -> CompressedTensorsScheme:
    return CompressedTensorsScheme(CompressedTensorsConfig.from_dict(config(*WAYS[way])))


def encoded(method: CompressedTensorsScheme, shard: Shard, weight: torch.Tensor, step: int, ops: Any) -> dict[str, Any]:
    """What every rank gets of the whole weight, quantized in runs of `step` rows; flat."""
    components = method.encoded_components(NAME, shard.shape, shard.dtype)
    out = {}
    for component in components:
        out[component.name] = torch.empty(component.shape(shard.shape), dtype=getattr(torch, component.dtype))
    for at in range(0, len(weight), step):
        rows = weight[at : at + step]
        part = {}
        for component in components:
            span = component.block_shape[0]
            part[component.name] = out[component.name][at // span : -(-(at + len(rows)) // span)].view(-1)
        method.encode(NAME, rows, part, ops)
    return {name: value.view(-1) for name, value in out.items()}


def library_state(way: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], Any, Any]:
    """What the library's own compressor stores of a weight, the compressor, and the scheme it works by."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, maybe_pad_tensor_for_block_quant

    file_format, weights = WAYS[way]
    theirs = QuantizationScheme(targets=["Linear"], weights=weights, format=file_format)
    args = theirs.weights
    if args.strategy == "tensor":
        low, high = weight.amin().view(1), weight.amax().view(1)
    elif args.strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    elif args.strategy == "group":
        grouped = weight.unflatten(1, (-1, args.group_size))
        low, high = grouped.amin(-1), grouped.amax(-1)
    else:
        rows, columns = args.block_structure
        padded = maybe_pad_tensor_for_block_quant(weight, args.block_structure)
        tiles = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
    scale, zero = calculate_qparams(low, high, args)
    compressor = BaseCompressor.get_value_from_registry(file_format)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    return compressor.compress(state, theirs), compressor, theirs


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("way", WAYS)
def test_every_stored_bit_is_the_librarys(way, dtype):
    weight = torch.randn(72, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[3], weight[5, :16], weight[7, 2], weight[9] = 0, 0, 30, weight[9].abs()
    weight[11] *= 1e-6
    if not WAYS[way][1].get("symmetric", True):
        weight[3], weight[5, :16] = 0.25, -0.5  # a zero point of zeros is 0 / 0
    theirs, compressor, their_scheme = library_state(way, weight)
    shard, method = Shard(NAME, (72, 96), str(dtype).removeprefix("torch.")), scheme(way)
    for ops in (reference, choose(Kernel.AUTO, torch.device("cpu")).ops):
        flown = encoded(method, shard, weight, 24, ops)
        ours = method.pack(shard, flown, ops)
        named = {name or "weight": value for name, value in ours.items()}
        assert named.keys() == theirs.keys()
        for name, value in named.items():
            assert same_bits(value, theirs[name]), name
        whole = compressor.decompress(theirs, their_scheme)["weight"]
        assert torch.equal(method.dequantize(shard, ours, dtype, ops), whole.to(dtype))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [32, 96, 40])
def test_words_are_the_librarys(bits, count):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    top = 1 << bits - 1
    values = torch.randint(-top, top, (5, count), generator=torch.Generator().manual_seed(bits), dtype=torch.int8)
    words = pack_to_int32(values, bits)
    assert torch.equal(from_words(words, bits, count), values)
    if bits in (4, 8):
        assert torch.equal(to_words(values, bits), words)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_slices_commute_with_dequantizing(way, data):
    """Cut as stored, in whole units of the layout, then dequantized: the slice of the dequantized whole."""
    method, (rows, columns) = scheme(way), (data.draw(st.sampled_from([48, 72, 80])), 96)
    shape = (rows, columns)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)
    theirs, *_ = library_state(way, weight)
    stored = {"" if name == "weight" else name: value for name, value in theirs.items()}
    dim, ranks = data.draw(st.integers(0, 1)), data.draw(st.integers(1, 4))
    layout = method.layout(NAME, shape, "bfloat16")
    alignment = data.draw(st.sampled_from(layout.alignments(shape, dim)))
    partition = even_partition(shape[dim], alignment, ranks)
    if partition is None:
        return
    whole = method.dequantize(Shard(NAME, shape, "bfloat16"), stored, torch.bfloat16, reference)
    for rank in range(ranks):
        shard = Shard(NAME, shape, "bfloat16", dim, partition, rank)
        parts = {}
        for component in layout.components:
            value = stored[component.name].view(component.shape(shape))
            at = component.slice(shape, dim, *partition.segments(rank)[0])
            value = value if at is None else value.narrow(at[0], at[1], at[2] - at[1])
            parts[component.name] = value.contiguous().view(-1)
        local = method.pack_prequantized(shard, parts, frozenset())
        start, stop = partition.segments(rank)[0]
        assert torch.equal(
            method.dequantize(shard, local, torch.bfloat16, reference), whole.narrow(dim, start, stop - start)
        )
        assert sum(value.nbytes for value in local.values()) == method.shard_nbytes(shard)
        if "weight_shape" in local:
            assert local["weight_shape"].tolist() == list(shard.local_shape)


def test_units_are_those_of_the_groups_and_words():
    layouts = {way: scheme(way).layout(NAME, (96, 96), "bfloat16") for way in WAYS}
    alignments = {way: tuple(layout.alignments((96, 96), dim)[-1] for dim in (0, 1)) for way, layout in layouts.items()}
    assert alignments["int4"] == (1, 16)
    assert alignments["int4-zeros"] == (8, 16)
    assert alignments["int4-rows"] == (8, 8)
    assert alignments["int8-packed"] == (4, 4)
    assert alignments["int8-rows"] == alignments["fp8-rows"] == alignments["fp8-tensor"] == (1, 1)
    assert alignments["fp8-blocks"] == (24, 16)


def test_targets_win_as_in_the_library():
    from compressed_tensors.utils.match import match_targets

    targets = ["Linear", "re:.*proj", "re:.*up.*", "re:.*mlp.*", "model.layers.0.mlp.up_proj", "lm_head"]
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj", "lm_head"]
    for name in [*names, "model.other"]:
        theirs = match_targets(name, torch.nn.Linear(1, 1), targets)
        assert target_of((name,), {target: target for target in targets}) == theirs[0]
    assert target_of(("model.other",), {"re:.*proj": "a"}) is None


# -- what is refused ---------------------------------------------------------------------------------------------------


def refusal(model: Any, quant: Any = None, **kwargs: Any) -> str:
    with pytest.raises(dq.InputError) as caught:
        dq.plan(str(model), quantization_config=quant, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize(
    ("file_format", "weights", "more", "expected"),
    [
        ("nvfp4-pack-quantized", {"type": "float", "num_bits": 4, "strategy": "tensor_group", "group_size": 16}, {},
         "'nvfp4-pack-quantized' is not supported"),
        ("mxfp4-pack-quantized", {"type": "float", "num_bits": 4, "strategy": "group", "group_size": 32}, {},
         "'mxfp4-pack-quantized' is not supported"),
        ("marlin-24", {**INT, "num_bits": 4, "strategy": "channel"}, {}, "'marlin-24' is not supported"),
        ("int-quantized", {**INT, "num_bits": 8, "strategy": "channel"}, SPARSE,
         "sparsity_config: sparse weights are not supported"),
        ("int-quantized", {**INT, "num_bits": 8, "strategy": "channel"}, ROTATED,
         "transform_config: transforms"),
        ("pack-quantized", {**INT, "num_bits": 3, "strategy": "channel"}, {}, "3 bits: weights are quantized to"),
        ("pack-quantized", {**INT, "num_bits": 4, "strategy": "group", "group_size": 48}, {},
         "group_size: 48 does not fit 12 of 14 modules"),
        ("pack-quantized", {**INT, "num_bits": 4, "strategy": "group", "group_size": 32, "actorder": "group"}, {},
         "weights.actorder: 'group' gives each column a group"),
        ("pack-quantized", {**FLOAT, "strategy": "channel"}, {}, "only symmetric FP8, not packed"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_said_before_weights_move(model_of, file_format, weights, more, expected):
    assert expected in refusal(model_of("llama-gqa"), config(file_format, weights, **more))


def test_a_target_that_matches_nothing_and_a_fixed_range_are_told_together(model_of):
    given = config("float-quantized", {**FLOAT, "strategy": "tensor"})
    given["config_groups"]["group_0"] |= {
        "targets": ["re:.*nothing"],
        "input_activations": {**FLOAT, "strategy": "tensor"},
    }
    told = refusal(model_of("llama-gqa"), given)
    assert "'re:.*nothing' matches no linear module" in told
    assert "needs calibration" in told


def golden(kind: str, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    shutil.copytree(DATA / kind, folder)
    return folder, load_file(folder / "model.safetensors")


def test_missing_and_unexplained_components_are_told_together(tmp_path):
    folder, tensors = golden("int4", tmp_path / "model")
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    tensors["model.layers.0.mlp.down_proj.input_scale"] = torch.ones(1)
    tensors["model.layers.0.mlp.gate_proj.weight_packed"] = torch.zeros(96, 9, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    told = refusal(folder)
    assert "up_proj.weight: the checkpoint lacks weight_scale" in told
    assert "down_proj.weight: the checkpoint stores input_scale, which 'pack-quantized' and its group do not" in told
    assert "gate_proj.weight: weight_packed is stored as [96, 9], its config and shape need [96, 8]" in told


@pytest.mark.parametrize(
    ("component", "value", "expected"),
    [
        ("weight_shape", torch.tensor([96, 32]), r"weight_shape says \[96, 32\], the model has \[96, 64\]"),
        ("weight_g_idx", torch.arange(64) % 2, "weight_g_idx gives columns a group of their own choice"),
        ("weight_zero_point", torch.ones(96, 2, dtype=torch.int8), "it has zero points, and its group is symmetric"),
    ],
)  # fmt: skip
def test_values_that_contradict_the_config_are_refused(tmp_path, component, value, expected):
    folder, tensors = golden("int4", tmp_path / "model")
    tensors[f"model.layers.0.mlp.up_proj.{component}"] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(dq.InputError, match=f"layers.0.mlp.up_proj.weight: .*{expected}"):
        dq.load(folder)


def test_other_dtypes_than_the_config_means_are_told_together(tmp_path):
    folder, tensors = golden("int4", tmp_path / "model")
    tensors["model.layers.0.mlp.up_proj.weight_packed"] = torch.zeros(96, 8)
    tensors["model.layers.0.mlp.gate_proj.weight_scale"] = torch.ones(96, 2, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    told = refusal(folder)
    assert "up_proj.weight: weight_packed is stored as F32, and must be I32" in told
    assert "gate_proj.weight: weight_scale is stored as I32, and must be F32 or BF16 or F16" in told


def test_trivial_leftovers_of_older_files_are_taken(tmp_path):
    folder, tensors = golden("int4", tmp_path / "model")
    tensors["model.layers.0.mlp.up_proj.weight_g_idx"] = torch.arange(64, dtype=torch.int32) // 32
    tensors["model.layers.0.mlp.up_proj.weight_zero_point"] = torch.zeros(96, 2, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = dq.load(folder)
    assert dq.fingerprint(model) == dq.fingerprint(dq.load(DATA / "int4"))
    assert "weight_g_idx" not in model.model.layers[0].mlp.up_proj.state_dict()


def test_the_library_is_not_needed(tmp_path):
    code = f"""
import distquant as dq
model = dq.load({str(DATA / "mixed")!r})
model.save_pretrained({str(tmp_path / "saved")!r})
print(dq.fingerprint(model))
"""
    done = run_without(("compressed_tensors",), tmp_path / "packages", code)
    assert done.stdout.split() == [dq.fingerprint(dq.load(DATA / "mixed"))], done.stderr
    assert dq.fingerprint(dq.load(tmp_path / "saved")) == dq.fingerprint(dq.load(DATA / "mixed"))


def test_activations_and_cache_are_noted(tmp_path):
    folder, tensors = golden("fp8-static", tmp_path / "model")
    tensors["model.layers.0.self_attn.k_proj.output_scale"] = torch.ones(1, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "stores output_scale" in refusal(folder)
    text = json.loads((folder / "config.json").read_text())
    text["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    (folder / "config.json").write_text(json.dumps(text))
    notes = "\n".join(dq.plan(folder).notes)
    assert "not applied: kv_cache_scheme" in notes
    assert "not applied: quantization of activations, in 7 linear modules" in notes
    assert dq.fingerprint(dq.load(folder)) == dq.fingerprint(dq.load(DATA / "fp8-static"))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_scales_are_widened_never_narrowed(tmp_path, stored):
    folder, tensors = golden("int4", tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    tensors[name] = tensors[name].to(stored) * (1 + 2**-9 if stored == torch.float32 else 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for dtype in ("float32", "bfloat16"):
        kept = dq.load(folder, dtype=dtype).model.layers[0].mlp.up_proj.weight_scale
        assert torch.equal(kept.double(), tensors[name].double())


def test_segments_of_one_rank_keep_their_order():
    """A packed projection: a rank holds a run of each part, and its stored components follow them."""
    method, partition = scheme("int4-zeros"), Partition(64, (((0, 16), (32, 48)), ((16, 32), (48, 64))))
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    theirs, *_ = library_state("int4-zeros", weight)
    shape = (64, 32)
    whole = method.dequantize(Shard(NAME, shape, "bfloat16"), theirs, torch.bfloat16, reference)
    for rank in range(2):
        shard = Shard(NAME, shape, "bfloat16", 0, partition, rank)
        parts = {}
        for component in method.layout(NAME, shape, "bfloat16").components:
            slices = [component.slice(shape, 0, *segment) for segment in partition.segments(rank)]
            pieces = [theirs[component.name][at[1] : at[2]] for at in slices if at is not None]
            parts[component.name] = torch.cat(pieces).view(-1)
        found = method.dequantize(shard, method.pack_prequantized(shard, parts, frozenset()), torch.bfloat16, reference)
        assert torch.equal(found, torch.cat([whole[a:b] for a, b in partition.segments(rank)]))
