"""Errors and tables that pages quote are those that distquant prints now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.constants import HF_HUB_CACHE

import distquant as dq
from distquant.planning.summary import plan_text

DOCS = Path(__file__).resolve().parents[2] / "docs"

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "options",
    [
        {"quantization_config": "nf4dq"},
        {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4", "bnb_4bit_compute_dtype": "bf16"}},
        {"quantization_config": {"load_in_4bit": True, "load_in_8bit": True}},
        {
            "quantization_config": {**NF4, "bnb_4bit_quant_storage": "int4"},
            "mesh": "tp=2,pp=2",
            "max_memory": 24,
        },
        {"model": "no/such-model"},
    ],
    ids=["name", "fields", "exclusive", "three", "absent"],
)
def test_errors_on_the_page_are_real(kjv_tiny: str, options: dict[str, Any]) -> None:
    with pytest.raises(dq.InputError) as raised:
        dq.plan(**{"model": kjv_tiny, **options})
    assert f"distquant: {raised.value}".replace(HF_HUB_CACHE, "~/.cache/huggingface/hub") in page("errors.md")


def test_the_plan_of_the_demo_is_real(kjv_tiny: str) -> None:
    """Compares all lines of the plan but those with paths and digests."""
    plan = dq.plan(kjv_tiny, quantization_config="nf4-dq", mesh="tp=2")
    shown = page("demo.md").splitlines()
    lines = [line.rstrip() for line in plan_text(plan).splitlines()]
    stable = [line for line in lines if kjv_tiny not in line and plan.digest[:16] not in line]
    assert [line for line in stable if line not in shown] == []


def test_rules_on_the_planning_page_are_real(kjv_tiny: str) -> None:
    plan, shown = dq.plan(kjv_tiny, quantization_config="nf4-dq", mesh="tp=3"), page("planning.md")
    patterns = ("model.layers.*.self_attn.q_proj", "model.layers.*.mlp.down_proj", "lm_head")
    rows = [line.split("  ") for line in shown.splitlines() if line.startswith(patterns)]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    rules = {rule.pattern: [rule.asked, rule.became, str(rule.modules), rule.reason] for rule in plan.rules}
    assert cells == {pattern: rules[pattern] for pattern in patterns}
