"""Words, grids and shards of GPTQ, AWQ and AutoRound's packings, against definitions written once more."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_words import Kind, dense_weight, make_weight, pack_awq, pack_bits, unpack_bits
from safetensors.torch import load_file, save_file

import distquant as dq
from distquant.config import AutoRoundConfig, AwqConfig, GptqConfig
from distquant.errors import InputError
from distquant.kernels import reference
from distquant.quantization import Shard, scheme_for
from distquant.quantization.algorithms.bit_packing import pack_words, unpack_words
from distquant.quantization.algorithms.rtn import Grid, quantize_rtn
from distquant.quantization.linear.gptqmodel_matmul import missing
from distquant.quantization.methods.auto_round import kind_of
from distquant.quantization.packed_int import PackedIntScheme
from distquant.quantization.packing import AWQ_ORDER
from distquant.sharding.layout import ALL
from distquant.sharding.partition import Partition

DATA = Path(__file__).resolve().parents[2] / "data"
GOLDEN = ("gptq/v1-4bit", "gptq/v2-3bit-act-order", "awq/gemm", "auto_round/auto_gptq")


def scheme_of(kind: Kind) -> PackedIntScheme:
    written = kind.config([])
    cls = {"gptq": GptqConfig, "awq": AwqConfig, "auto-round": AutoRoundConfig}[kind.method]
    found = scheme_for(cls.from_dict(written))
    assert isinstance(found, PackedIntScheme)
    return found


# -- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_one_stream_of_bits_along_either_dim(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 2**bits, (96, 40))
    words = torch.from_numpy(pack_bits(values, bits).view(np.int32))
    tensor = torch.from_numpy(values)
    assert torch.equal(pack_words(tensor, bits, 0), words)
    assert torch.equal(pack_words(tensor.t(), bits, 1), words.t())
    assert torch.equal(unpack_words(words, bits, 0, torch.int64), tensor)
    assert torch.equal(unpack_words(words.t(), bits, 1, torch.int64), tensor.t())


def test_words_of_awq() -> None:
    values = np.random.default_rng(0).integers(0, 16, (5, 24))
    words = torch.from_numpy(pack_awq(values).view(np.int32))
    assert torch.equal(pack_words(torch.from_numpy(values), 4, 1, AWQ_ORDER), words)
    assert torch.equal(unpack_words(words, 4, 1, torch.int64, AWQ_ORDER), torch.from_numpy(values))


# -- grid --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_lie_on_the_grid_of_the_definition(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    rows = torch.randn(3, 80, generator=torch.Generator().manual_seed(bits)).to(dtype)
    rows[1, 32:64] = 0
    codes, scales, zeros = quantize_rtn(rows, 32, Grid(bits, symmetric))
    top = np.float32(2**bits - 1)
    for row in range(3):
        for number, start in enumerate(range(0, 80, 32)):
            x = rows[row, start : start + 32].float().numpy()
            low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
            if symmetric:
                high = max(-low, high)
                low = -high
            if low == high == 0:
                low, high = np.float32(-1), np.float32(1)
            scale = np.float32(high - low) / top
            zero = np.float32(2 ** (bits - 1)) if symmetric else np.round(-low / scale)
            expected = np.clip(np.round(x / scale) + zero, 0, top)
            assert codes[row, start : start + 32].tolist() == expected.tolist()
            assert scales[row, number].item() == np.float16(scale)
            assert zeros[row, number].item() == zero


def test_a_group_with_a_nan_or_an_infinity_keeps_it_in_its_scale() -> None:
    rows = torch.ones(2, 32)
    rows[0, 3], rows[1, 4] = torch.nan, torch.inf
    codes, scales, zeros = quantize_rtn(rows, 32, Grid(4, symmetric=False))
    assert scales[0].isnan().all()
    assert scales[1].isinf().all()
    assert zeros.tolist() == [[0], [0]]
    assert codes[0].eq(0).all()


@pytest.mark.parametrize(("bits", "awq"), [(2, False), (3, False), (4, False), (8, False), (4, True)])
def test_rounding_to_nearest_stores_what_the_grid_says(bits: int, awq: bool) -> None:
    """What flows and is packed, read by the independent unpacker, is codes, zeros and scales of the grid."""
    kind = Kind(method="awq" if awq else "gptq", bits=bits)
    scheme, weight = scheme_of(kind), torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    shard = Shard("m.weight", (64, 96), "float32")
    transfer = {c.name: c for c in scheme.encoded_components(shard.name, shard.shape, shard.dtype)}
    parts = {n: torch.empty(c.shape(shard.shape), dtype=getattr(torch, c.dtype)).view(-1) for n, c in transfer.items()}
    scheme.encode(shard.name, weight, parts, reference)
    stored = scheme.pack(shard, parts, reference)
    codes, scales, zeros = quantize_rtn(weight, 32, scheme.packing("m.weight").grid)
    index = torch.arange(96) // 32
    steps = codes.int() - zeros.int()[:, index]
    expected = (steps.float() * scales.float()[:, index]).half()
    assert torch.equal(dense_weight(stored, kind), expected)
    assert torch.equal(scheme.dequantize(shard, stored, torch.float16, reference), expected)
    reach = (weight.view(64, 3, 32).amax(2) - weight.view(64, 3, 32).amin(2)).repeat_interleave(32, 1)
    # Half a step; the rounded zero point at the ends of the grid, and the scale in float16, cost up to another half.
    assert bool(((weight - expected.float()).abs() <= reach / (2**bits - 1) * 1.1).all())


# -- shards ------------------------------------------------------------------------------------------------------------

KINDS = st.one_of(
    st.builds(
        Kind,
        bits=st.sampled_from([2, 3, 4, 8]),
        group=st.sampled_from([16, 32, 64, 100, -1]),
        v1=st.booleans(),
        act_order=st.booleans(),
        index=st.just(True),
    ),
    st.builds(Kind, method=st.just("awq"), group=st.sampled_from([16, 32, -1])),
)


@settings(max_examples=60, deadline=None)
@given(kind=KINDS, dim=st.sampled_from([0, 1]), data=st.data())
def test_slicing_and_dequantizing_commute(kind: Kind, dim: int, data: st.DataObject) -> None:
    shape = (96, 192)
    scheme, name = scheme_of(kind), "m.weight"
    layout = scheme.layout(name, shape, "float16")
    (*_, alignment) = layout.alignments(shape, dim)
    edges = sorted(data.draw(st.sets(st.integers(0, -(-shape[dim] // alignment)), min_size=2, max_size=4)) | {0})
    partitions = [min(edge * alignment, shape[dim]) for edge in edges]
    partitions = [*partitions, shape[dim]] if partitions[-1] != shape[dim] else partitions
    partition = Partition(shape[dim], tuple(((a, b),) for a, b in pairwise(partitions)))
    stored = make_weight(shape, kind, data.draw(st.integers(0, 3)), torch.bfloat16)
    dense = dense_weight(stored, kind).float()
    for rank in range(len(partition.parts)):
        shard = Shard(name, shape, "float32", dim, partition, rank)
        parts = {}
        for component in layout.components:
            whole = stored[component.name]
            start, stop = partition.segments(rank)[0]
            found = component.slice(shape, dim, start, stop)
            if component.name == "g_idx":
                whole = whole[start:stop] if dim == 1 else whole
            elif found is not None:
                whole = whole.narrow(found[0], found[1], found[2] - found[1])
            parts[component.name] = whole.contiguous().view(-1)
        local = scheme.pack_prequantized(shard, parts, frozenset())
        start, stop = partition.segments(rank)[0]
        assert torch.equal(
            scheme.dequantize(shard, local, torch.float32, reference), dense.narrow(dim, start, stop - start)
        )
        assert sum(value.nbytes for value in local.values()) == scheme.shard_nbytes(shard)


def test_scales_of_reordered_inputs_do_not_limit_a_cut() -> None:
    scheme = scheme_of(Kind(group=64, act_order=True))
    layout = scheme.layout("m.weight", (64, 256), "float16")
    assert layout.alignments((64, 256), 1) == (8,)
    assert layout.component("scales").block_shape[1] == ALL
    assert layout.component("scales").shape((64, 8)) == (*layout.component("scales").shape((64, 256))[:1], 64)
    assert scheme_of(Kind(group=64)).layout("m.weight", (64, 256), "float16").alignments((64, 256), 1) == (64,)


@pytest.mark.parametrize("whole", [False, True])
def test_an_index_that_is_no_sequence_is_an_error_unless_the_config_says_so(whole: bool) -> None:
    kind = Kind(act_order=True)
    stored = {name: value.view(-1) for name, value in make_weight((32, 64), kind, 0, torch.float16).items()}
    shard = Shard("m.weight", (32, 64), "float16")
    assert scheme_of(kind).pack_prequantized(shard, stored, frozenset())["g_idx"].tolist() == stored["g_idx"].tolist()
    with pytest.raises(InputError, match=r"m\.weight: g_idx is not a sequence .*desc_act=false"):
        scheme_of(Kind()).pack_prequantized(shard, stored, frozenset({"g_idx"} if whole else ()))
    stored["g_idx"][5] = 2
    with pytest.raises(InputError, match=r"g_idx names groups 0 to 2, and there are 2"):
        scheme_of(kind).pack_prequantized(shard, stored, frozenset())


# -- golden files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_files_dequantize_to_their_definition(name: str) -> None:
    folder = DATA / name
    stored = load_file(folder / "model.safetensors")
    model = dq.load(str(folder))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    modules = sorted({key.rpartition(".")[0] for key in stored if key.endswith("qweight")})
    assert sorted(model.distquant.plan.converted) == modules
    for module in modules:
        own = {"bits": 8, "group_size": 16} if name.startswith("auto") and module.endswith("down_proj") else config
        kind = Kind(
            method=config["quant_method"],
            bits=own["bits"],
            group=own["group_size"],
            v1=config.get("checkpoint_format", "gptq") == "gptq",
            packing=config.get("packing_format", ""),
        )
        parts = {key.rpartition(".")[2]: value for key, value in stored.items() if key.startswith(module + ".")}
        ours = model.get_submodule(module)
        assert torch.equal(ours.weight, dense_weight(parts, kind)), module
        for component, value in parts.items():
            assert torch.equal(ours.components[component], value), f"{module}.{component}"


@pytest.mark.parametrize("name", ["gptq/v1-4bit", "awq/gemm"])
def test_golden_files_equal_upstream_where_it_is_installed(name: str) -> None:
    """By gptqmodel's kernels, with which transformers loads them (and needs optimum's GPTQ for one, and fails at groups
    of 16 for the other, because the kernel that it chooses on a CPU does not have them)."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    ids = torch.arange(12).view(1, -1)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        theirs = dq.load(str(DATA / name), dtype="float16", forward="gptqmodel")
        assert theirs.distquant.report.forward.startswith("gptqmodel's ")
        found = theirs(ids).logits
        expected = dq.load(str(DATA / name), dtype="float16")(ids).logits
    torch.testing.assert_close(found, expected)


def test_zero_points_of_version_one_are_whole_words_less_one() -> None:
    """A zero point of 0 borrows from the field above it, as GPTQModel's subtraction does."""
    zeros = torch.tensor([[0, 5, 0, 0, 15, 8, 1, 0]], dtype=torch.uint8)
    scheme = scheme_of(Kind())
    packing = scheme.packing("m.weight")
    stored = packing.pack_zeros(zeros)
    word = sum(int(value) << 4 * at for at, value in enumerate(zeros[0])) - 0x11111111 & 0xFFFFFFFF
    assert stored.item() & 0xFFFFFFFF == word
    assert torch.equal(packing.unpack_zeros(stored, torch.uint8), zeros)
    threes = torch.arange(32, dtype=torch.uint8).remainder(8).view(1, -1)
    packing = scheme_of(Kind(bits=3)).packing("m.weight")
    stored = packing.pack_zeros(threes)
    fields = unpack_bits(stored.numpy().view(np.uint32).T, 3).T
    assert fields.tolist() == [[(value - 1) % 8 for value in threes[0].tolist()]]
    assert torch.equal(packing.unpack_zeros(stored, torch.uint8), threes)


# -- which modules, and what cannot work -------------------------------------------------------------------------------


@pytest.fixture
def golden(tmp_path: Path) -> Any:
    def copy(name: str, **changed: Any) -> Path:
        target = tmp_path / name.replace("/", "-")
        shutil.copytree(DATA / name, target, dirs_exist_ok=True)
        config = json.loads((target / "config.json").read_text())
        config["quantization_config"] |= changed
        (target / "config.json").write_text(json.dumps(config))
        return target

    return copy


def told(call: Any) -> str:
    with pytest.raises(InputError) as caught:
        call()
    return "\n".join(str(problem) for problem in caught.value.problems)


def test_what_is_stored_decides_and_the_config_is_compared_with_it(golden: Any) -> None:
    folder = golden("gptq/v1-4bit", modules_in_block_to_quantize=[["self_attn.q_proj"], ["mlp.up_proj"]])
    plan = dq.plan(str(folder))
    assert len(plan.converted) == 7
    assert any(note.startswith("stored quantized, though the config leaves them out: 5") for note in plan.notes)
    tensors = load_file(folder / "model.safetensors")
    kept = {}
    for key, value in tensors.items():
        module, _, leaf = key.rpartition(".")
        if leaf in ("qzeros", "scales", "g_idx") and not module.endswith(("q_proj", "up_proj")):
            continue
        if leaf == "qweight" and not module.endswith(("q_proj", "up_proj")):
            kept[f"{module}.weight"] = torch.zeros(value.shape[1], value.shape[0] * 8, dtype=torch.float16)
        else:
            kept[key] = value
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    assert dq.plan(str(folder)).converted == tuple(
        f"model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.up_proj")
    )
    for rule in ({"dynamic": {r"-:.*\.(k_proj|v_proj|o_proj|gate_proj|down_proj)": {}}}, {}):
        folder = golden("gptq/v1-4bit", **rule)
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        plan = dq.plan(str(folder))
        assert len(plan.converted) == 2
        plain = "stored unquantized, though the config has them quantized: 5"
        assert any(note.startswith(plain) for note in plan.notes) == (not rule)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("gptq/v1-4bit", {"checkpoint_format": "marlin"}, "quantization_config.format: 'marlin' is one kernel's own"),
        ("gptq/v1-4bit", {"pack_dtype": "int16"}, "quantization_config.pack_dtype: 'int16'"),
        ("gptq/v1-4bit", {"bits": 8}, "qweight is stored as [8, 64], its config and shape need [16, 64]"),
        ("gptq/v1-4bit", {"group_size": 32}, "qzeros is stored as [4, 8], its config and shape need [2, 8]"),
        ("gptq/v1-4bit", {"dynamic": {"(": {}}}, "'(' is not a regular expression"),
        ("gptq/v1-4bit", {"dynamic": {".*up": {"bits": 5}}}, "'.*up' has bits=5"),
        ("gptq/v1-4bit", {"dynamic": {".*up": {"format": "gptq_v2"}}}, "'.*up' sets format, which cannot differ"),
        ("gptq/v1-4bit", {"dynamic": {".*up": 3}}, "'.*up' has 3, not a dict"),
        ("awq/gemm", {"version": "gemv"}, "quantization_config.format: 'gemv' is another kernel's layout"),
        ("awq/gemm", {"bits": 8}, "quantization_config.bits: 8: the gemm layout holds 4 bits only"),
        ("auto_round/auto_gptq", {"packing_format": "auto_round:mxfp4"}, "packing_format: 'auto_round:mxfp4' is not"),
        ("auto_round/auto_gptq", {"act_bits": 8}, "quantization_config.act_bits: 8 is not supported"),
        ("auto_round/auto_gptq", {"bits": 5}, "quantization_config.bits: 5 is not supported"),
        ("auto_round/auto_gptq", {"data_type": "mx_fp"}, "quantization_config.data_type: 'mx_fp' is not supported"),
        ("auto_round/auto_gptq", {"extra_config": {"up": {"bits": 7}}}, "'up' has bits=7"),
    ],
)
def test_what_cannot_work_is_told_before_weights_move(golden: Any, name: str, changed: Any, message: str) -> None:
    assert message in told(lambda: dq.plan(str(golden(name, **changed))))


@pytest.mark.parametrize(
    ("name", "component", "dtype", "message"),
    [
        ("gptq/v1-4bit", "qweight", torch.float32, "qweight is stored as F32, and must be I32"),
        ("awq/gemm", "qzeros", torch.int16, "qzeros is stored as I16, and must be I32"),
        ("gptq/v2-3bit-act-order", "scales", torch.int32, "scales is stored as I32, and must be F32 or BF16 or F16"),
    ],
)
def test_other_dtypes_are_told_before_weights_move(
    golden: Any, name: str, component: str, dtype: torch.dtype, message: str
) -> None:
    folder = golden(name)
    stored = load_file(folder / "model.safetensors")
    key = next(key for key in stored if key.endswith(f"up_proj.{component}"))
    save_file({**stored, key: stored[key].to(dtype)}, folder / "model.safetensors", {"format": "pt"})
    assert f"up_proj.weight: {message}" in told(lambda: dq.plan(str(folder)))


def test_an_index_that_is_missing_is_made_where_groups_lie_in_order(golden: Any) -> None:
    for name, act_order in (("gptq/v1-4bit", False), ("gptq/v2-3bit-act-order", True)):
        folder = golden(name)
        tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.endswith("g_idx")}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        if act_order:
            assert "the checkpoint lacks g_idx of this quantized weight" in told(lambda: dq.plan(str(folder)))  # noqa: B023
        else:
            assert dq.fingerprint(dq.load(str(folder))) == dq.fingerprint(dq.load(str(DATA / name)))


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ({"quant_method": "gptq", "bits": 4, "desc_act": True}, "desc_act: the order of activations needs calibration"),
        ({"quant_method": "gptq", "bits": 4, "dataset": "c4"}, "dataset: 'c4' asks for calibration"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*nose": {}}}, "'-:.*nose' matches no linear module"),
        ({"quant_method": "awq", "group_size": 80}, "192 inputs are not a multiple of the group size 80 (and 1 more"),
        ({"quant_method": "auto-round"}, "auto-round learns its rounding on data"),
    ],
)
def test_what_cannot_be_made_on_the_way(model_of: Any, quant: Any, message: str) -> None:
    assert message in told(lambda: dq.plan(model_of("llama-gqa"), quantization_config=quant))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("auto_round:auto_gptq", "gptq"), ("auto_round:gptq", "gptq"), ("auto", "gptq"),
        ("auto_round:gptq:exllamav2", "gptq"), ("auto_round:auto_awq", "awq"), ("auto_round:awq", "awq"),
        ("auto_round", "gptq_v2"), ("auto_round:exllamav2", "gptq_v2"), ("auto_round:gptqmodel", "gptq_v2"),
        ("auto_round:fp8", None),
    ],
)  # fmt: skip
def test_packing_formats_name_a_layout(text: str, kind: str | None) -> None:
    assert kind_of(text) == kind


def test_adapters_train_on_packed_weights(model_of: Any) -> None:
    from peft import LoraConfig, get_peft_model

    for quant in ("gptq-rtn", {"quant_method": "awq", "bits": 4, "group_size": 32}):
        model = dq.load(model_of("llama-gqa"), quantization_config=quant, dtype="float32")
        before = dq.fingerprint(model)
        tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
        ids = torch.arange(12).view(1, -1)
        optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.5)
        losses = []
        for _ in range(3):
            loss = tuned(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[2] < losses[0]
        assert not any(p.is_meta for p in (*tuned.parameters(), *tuned.buffers()))
        tuned.unload()
        assert dq.fingerprint(model) == before
