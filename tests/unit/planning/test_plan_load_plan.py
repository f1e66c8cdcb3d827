"""The frozen plan: JSON both ways, a digest that every field moves, and formats that are refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from distquant.environment import Environment
from distquant.errors import InputError
from distquant.model import Source
from distquant.planning import (
    AttentionShard,
    ExpertsShard,
    HeadPartition,
    LoadPlan,
    ModuleShard,
    Partition,
    RankMemory,
    Rule,
    TensorPlan,
    even_partition,
    head_partitions,
)
from distquant.sharding.mesh import Mesh


def small_plan() -> LoadPlan:
    up = "model.layers.0.mlp.up_proj.weight"
    experts = tuple(Source(f"e.{i}.w1", "", (i, 0, 0)) for i in range(2))
    return LoadPlan(
        model="some/model",
        model_type="llama",
        architecture="LlamaForCausalLM",
        mesh=Mesh(dp=2, tp=3),
        dtype="bfloat16",
        quantization_config={
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "llm_int8_skip_modules": ["lm_head"],
        },
        selection={"include_modules": None, "layers": "0-3"},
        prequantized=False,
        dequantize=False,
        tensors=(
            TensorPlan(up, (704, 64), "bfloat16", "bitsandbytes_4bit", (Source(up), Source("x", "absmax")), 0, "cut0"),
            TensorPlan("experts.*.up_proj.weight", (2, 4, 4), "bfloat16", "none", experts, 1, "cut1", experts="cut2"),
            TensorPlan("gate", (8,), "float32", "none", (Source("packed", "", None, (0, 8, 16)),)),
        ),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        partitions={
            "cut0": even_partition(704, 64, 3),
            "cut1": Partition(4, (((0, 1), (2, 3)), ((1, 2),), ((3, 4),))),
            "cut2": even_partition(2, 1, 1),
        },
        heads={"heads0": next(head_partitions(10, 2, 3))},
        modules={"model.layers.0.mlp.up_proj": ModuleShard("colwise", "cut0")},
        attentions={"model.layers.0.self_attn": AttentionShard("heads0", 64)},
        experts={"model.layers.0.mlp.experts": ExpertsShard("cut2", "cut1")},
        dispatch="all_reduce",
        converted=("model.layers.0.mlp.up_proj",),
        rules=(Rule("model.layers.*.mlp.up_proj", "colwise", "colwise 256+256+192", "multiples of 64", 1),),
        notes=("größer: ein Hinweis",),
        memory=(RankMemory(0, 10, 20, 30, 40, 50), RankMemory(1, 11, 21, 31, 41, 51)),
        staging=1 << 20,
        nodes=(0, 0, 0, 1, 1, 1),
        device_map={"model": "cuda:0"},
        shards={"model-00001.safetensors": ("ab" * 32, 1000), "model-00002.safetensors": ("cd" * 32, 234)},
        check_at_load=("free memory",),
        environment=Environment(
            device_type="cuda", device_count=6, capability=(8, 9), memory=24 << 30, packages={"torch": "2.11"}
        ),
        trust_remote_code=True,
    )


CHANGES = {
    "nodes": (0, 0, 1, 1, 2, 2),
    "model": "other",
    "model_type": "qwen2",
    "architecture": "Qwen2ForCausalLM",
    "mesh": Mesh(dp=3, tp=2),
    "dtype": "float16",
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "selection": {"include_modules": None, "layers": "0-2"},
    "prequantized": True,
    "dequantize": True,
    "tensors": small_plan().tensors[::-1],
    "tied": {},
    "partitions": {"cut0": even_partition(704, 32, 3)},
    "heads": {"heads0": next(head_partitions(10, 5, 3))},
    "modules": {"model.layers.0.mlp.up_proj": ModuleShard("rowwise", "cut0")},
    "attentions": {"model.layers.0.self_attn": AttentionShard("heads0", 32)},
    "experts": {"model.layers.0.mlp.experts": ExpertsShard("cut2", None)},
    "dispatch": "all_to_all",
    "converted": (),
    "rules": (),
    "notes": (),
    "memory": (RankMemory(0, 10, 20, 30, 40, 51), RankMemory(1, 11, 21, 31, 41, 51)),
    "staging": (1 << 20) + 1,
    "device_map": None,
    "shards": {"model-00001.safetensors": ("ab" * 32, 1000), "model-00002.safetensors": ("ce" * 32, 234)},
    "check_at_load": (),
    "environment": Environment(
        device_type="cuda", device_count=6, capability=(9, 0), memory=24 << 30, packages={"torch": "2.11"}
    ),
    "trust_remote_code": False,
    "attn_implementation": "eager",
}

TENSOR_CHANGES = {
    "name": "other",
    "shape": (704, 65),
    "dtype": "float16",
    "scheme": "none",
    "sources": (Source("y"),),
    "shard_dim": 1,
    "partition": "cut1",
    "transposed": True,
    "reading": "scatter",
    "experts": "cut2",
}
SOURCE_CHANGES = {"tensor": "z", "component": "SCB", "offset": (0, 1), "take": (1, 0, 2)}


def test_round_trip():
    plan = small_plan()
    again = LoadPlan.from_json(plan.to_json())
    assert again == plan
    assert again.digest == plan.digest
    assert again.to_json() == plan.to_json()


def test_attention_that_nobody_asked_for_is_not_in_the_json():
    """Plans from before it could be asked for keep their digests."""
    assert "attn_implementation" not in json.loads(small_plan().to_json())


def test_round_trip_restores_types():
    again = LoadPlan.from_json(small_plan().to_json())
    assert type(again.tensors[1].sources[1].offset) is tuple
    assert type(again.tensors[2].sources[0].take) is tuple
    assert isinstance(again.heads["heads0"], HeadPartition)
    assert again.partitions["cut0"].lengths == [256, 256, 192]
    assert again.environment.capability == (8, 9)
    assert again.shards["model-00001.safetensors"] == ("ab" * 32, 1000)
    hash((again.tensors, again.partitions["cut1"], again.heads["heads0"], again.rules, again.memory))


@pytest.mark.parametrize("environment", [Environment(), Environment(memory=5, memory_source="--max-memory")])
def test_round_trip_of_unknown_facts(environment):
    plan = dataclasses.replace(small_plan(), environment=environment, device_map=None)
    assert LoadPlan.from_json(plan.to_json()) == plan


def test_json_is_canonical():
    text = small_plan().to_json()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    reordered = dataclasses.replace(small_plan(), shards=dict(reversed(small_plan().shards.items())))
    assert reordered.digest == small_plan().digest


def test_changes_cover_every_field():
    assert set(CHANGES) == {field.name for field in dataclasses.fields(LoadPlan)} - {"estimates"}
    assert set(TENSOR_CHANGES) == {field.name for field in dataclasses.fields(TensorPlan)}
    assert set(SOURCE_CHANGES) == {field.name for field in dataclasses.fields(Source)}


@pytest.mark.parametrize("field", sorted(CHANGES))
def test_every_field_but_the_facts_moves_the_digest(field):
    """The digest names what was decided; what was measured (free memory, say) changes from one load to the next."""
    plan = small_plan()
    changed = dataclasses.replace(plan, **{field: CHANGES[field]})
    assert (changed.digest != plan.digest) == (field != "environment")
    assert LoadPlan.from_json(changed.to_json()) == changed


@pytest.mark.parametrize("field", sorted(TENSOR_CHANGES))
def test_every_field_of_a_tensor_moves_the_digest(field):
    plan = small_plan()
    first = dataclasses.replace(plan.tensors[0], **{field: TENSOR_CHANGES[field]})
    changed = dataclasses.replace(plan, tensors=(first, *plan.tensors[1:]))
    assert changed.digest != plan.digest
    assert LoadPlan.from_json(changed.to_json()) == changed


@pytest.mark.parametrize("field", sorted(SOURCE_CHANGES))
def test_every_field_of_a_source_moves_the_digest(field):
    plan = small_plan()
    source = dataclasses.replace(plan.tensors[0].sources[0], **{field: SOURCE_CHANGES[field]})
    first = dataclasses.replace(plan.tensors[0], sources=(source,))
    base = dataclasses.replace(plan.tensors[0], sources=plan.tensors[0].sources[:1])
    changed, same = (dataclasses.replace(plan, tensors=(t, *plan.tensors[1:])) for t in (first, base))
    assert changed.digest != same.digest
    assert LoadPlan.from_json(changed.to_json()) == changed


def test_digest_is_sha256_and_the_same_for_equal_plans():
    digest = small_plan().digest
    assert len(digest) == 64
    assert int(digest, 16) >= 0
    assert digest == small_plan().digest


def test_frozen():
    plan = small_plan()
    for target, field in (
        (plan, "model"),
        (plan.tensors[0], "name"),
        (plan.partitions["cut0"], "size"),
        (plan.mesh, "tp"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(target, field, getattr(target, field))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a plan in JSON"),
        ("{", "not a plan in JSON"),
        ("{}", r"not a plan in JSON \(KeyError: 'format'\)"),
        ("null", "not a plan in JSON"),
        ("3", "not a plan in JSON"),
        ("[]", ""),
        ('["format"]', ""),
        ('{"format": 0}', r"format 0, this is 5\. Plan again"),
        ('{"format": "1"}', "format 1, this is 5"),
        ('{"format": 4}', ""),
    ],
)
def test_what_is_no_plan(text, message):
    with pytest.raises(InputError, match=f"^plan: .*{message}"):
        LoadPlan.from_json(text)


def test_another_version_of_the_format_is_refused():
    fields = json.loads(small_plan().to_json())
    assert fields["format"] == 5
    fields["format"] = 6
    with pytest.raises(InputError, match=r"^plan: format 6, this is 5\. Plan again with this version"):
        LoadPlan.from_json(json.dumps(fields))


@pytest.mark.parametrize("change", ["lacks", "unknown"])
def test_a_plan_with_other_fields_is_refused(change):
    fields = json.loads(small_plan().to_json())
    if change == "lacks":
        del fields["partitions"]
    else:
        fields["surprise"] = 1
    with pytest.raises(InputError, match=r"^plan: "):
        LoadPlan.from_json(json.dumps(fields))


def test_sums():
    plan = small_plan()
    assert plan.checkpoint_bytes == 1234
    assert (plan.memory[0].finished, plan.memory[0].peak) == (70, 120)


@pytest.mark.parametrize(
    ("pick", "old", "new"),
    [
        (lambda plan: plan, "cuts", "partitions"),
        (lambda plan: plan.tensors[0], "dim", "shard_dim"),
        (lambda plan: plan.tensors[0], "cut", "partition"),
        (lambda plan: next(iter(plan.modules.values())), "cut", "partition"),
        (lambda plan: ExpertsShard("cut0", "cut1"), "cut", "partition"),
    ],
)
def test_old_names_work_for_one_release(pick, old, new):
    record = pick(small_plan())
    with pytest.warns(DeprecationWarning, match=f"{type(record).__name__}.{old} is called {new} now"):
        assert getattr(record, old) == getattr(record, new)
    assert old not in {each.name for each in dataclasses.fields(record)}, "it would be written to the JSON"
