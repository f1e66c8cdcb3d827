"""Small models, layouts and a short way to ask for a rewritten tensor-parallel plan of them."""

from __future__ import annotations

from distquant.model import ModelDescription
from distquant.planning.tensor_parallel import ParallelPlan, rewrite_tp_plan
from distquant.sharding.layout import ALL, PLAIN_STEPS, Component, Layout, plain

HEADS, KV, DIM = 8, 2, 32
SMALL = {
    "hidden_size": HEADS * DIM,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "vocab_size": 320,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NF4 = Layout(
    (
        Component(name="", dtype="uint8", flat=2),
        Component(name="absmax", dtype="float32", flat=64, preferred_alignments=(64, 32)),
        Component(name="nested_absmax", dtype="float32", flat=64 * 256, replicated=True),
    )
)
SCB = Component(name="SCB", dtype="float32", block_shape=(1, ALL), preferred_alignments=PLAIN_STEPS)
INT8 = Layout((Component(name="", dtype="int8", preferred_alignments=PLAIN_STEPS), SCB))
BLOCKS = Layout(
    (Component(name="", dtype="float8_e4m3fn"), Component(name="scale", dtype="float32", block_shape=(128, 128)))
)
LAYOUTS = {"nf4": NF4, "int8": INT8, "blocks": BLOCKS, "plain": plain("bfloat16")}
MODELS = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": DIM}),
    "phi3": ("Phi3", {}),
    "phi3_mha": ("Phi3", {"num_key_value_heads": HEADS}),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": HEADS}),
    "olmo2": ("Olmo2", {"num_key_value_heads": 4}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "codegen": ("CodeGen", {"num_key_value_heads": HEADS, "rotary_dim": DIM}),
}


def layout_of(description: ModelDescription, layout: str):
    return lambda name: plain("bfloat16") if name == description.output_embedding else LAYOUTS[layout]


def rewrite(
    description: ModelDescription, ranks: int, layout: str = "nf4", tp_plan: dict[str, str] | None = None
) -> ParallelPlan:
    return rewrite_tp_plan(description, tp_plan or description.tp_plan, ranks, layout_of(description, layout))


def told(plan: ParallelPlan, pattern: str) -> list[tuple[str, str, str, int]]:
    return [(r.asked, r.became, r.reason, r.modules) for r in plan.rules if r.pattern.endswith(pattern)]


def partition_of(plan: ParallelPlan, module: str):
    return plan.partitions[plan.modules[module].partition]


def lengths(plan: ParallelPlan, module: str) -> list[int]:
    return partition_of(plan, module).lengths
