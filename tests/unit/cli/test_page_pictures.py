"""Pictures of weights: proportions, each rank's part where it is, and text that stays text."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from xml.etree import ElementTree

import pytest

import distquant as dq
from distquant.cli.page.folding import fold_ranks
from distquant.cli.page.markup import Html, escaped, table, tag
from distquant.cli.page.memory import answer, limit_of, memory_bars
from distquant.cli.page.pictures import LEFT, SHOWN_RANKS, Matrix, mesh_picture, owners, weight_picture
from distquant.cli.page.weights import division
from distquant.planning import LoadPlan
from distquant.planning.load_plan import TensorPlan
from distquant.sharding.mesh import Mesh
from distquant.sharding.partition import Partition, even_partition


def tensor_of(plan: LoadPlan, name: str) -> TensorPlan:
    return next(tensor for tensor in plan.tensors if tensor.name == name)


def drawn(plan: LoadPlan, name: str) -> tuple[Matrix, ElementTree.Element]:
    """The matrix and the parsed picture of a tensor."""
    tensor = tensor_of(plan, name)
    matrix = Matrix.of(tensor)
    assert matrix is not None
    return matrix, ElementTree.fromstring(weight_picture(plan, tensor, matrix, name))


def boxes(picture: ElementTree.Element, kind: str) -> list[tuple[float, float, float, float]]:
    """The place and size of each rectangle whose class begins so."""
    found = (rect for rect in picture.iter("rect") if rect.attrib["class"].startswith(kind))
    return [tuple(float(rect.attrib[key]) for key in ("x", "y", "width", "height")) for rect in found]  # type: ignore


def test_a_matrix_is_drawn_in_proportion_with_each_part_where_it_is(kjv_tiny: str) -> None:
    plan = dq.plan(kjv_tiny, quantization_config="nf4", mesh="tp=3")
    name = "model.layers.0.self_attn.q_proj.weight"  # rows 64 + 32 + 32
    matrix, picture = drawn(plan, name)
    ((_, top, width, height),) = boxes(picture, "whole")
    assert width / height == pytest.approx(matrix.columns / matrix.rows, rel=0.01)
    parts = boxes(picture, "c")
    assert [each[1] - top for each in parts] == pytest.approx([0, height / 2, height * 3 / 4], abs=0.2)
    assert [each[3] for each in parts] == pytest.approx([height / 2, height / 4, height / 4], abs=0.2)
    titles = [title.text for rect in picture.iter("rect") for title in rect.iter("title")]
    assert titles == ["rank 0: rows 0 to 63", "rank 1: rows 64 to 95", "rank 2: rows 96 to 127"]


def test_columns_are_side_by_side(kjv_tiny: str) -> None:
    _, picture = drawn(dq.plan(kjv_tiny, quantization_config="nf4", mesh="tp=2"), "model.layers.0.mlp.down_proj.weight")
    ((_, top, width, height),) = boxes(picture, "whole")
    first, second = boxes(picture, "c")
    assert (first[0], first[1], first[3]) == pytest.approx((LEFT, top, height), abs=0.1)
    assert second[0] == pytest.approx(LEFT + width / 2, abs=0.1)


def test_rows_on_several_ranks_are_striped_and_counted(model_of: Callable[[str], str]) -> None:
    plan = dq.plan(model_of("llama-gqa"), quantization_config="nf4", mesh="tp=4")  # two kv heads
    name = "model.layers.0.self_attn.k_proj.weight"
    _, picture = drawn(plan, name)
    assert {kind for rect in picture.iter("rect") if " s" in (kind := rect.attrib["class"])} == {
        f"c{rank} s" for rank in range(4)
    }
    assert "because some are on several ranks" in division(plan, tensor_of(plan, name))


def test_experts_are_a_stack_with_their_ranks(moe_of: Callable[..., str]) -> None:
    plan = dq.plan(moe_of("deepseek-v3"), mesh="ep=2,tp=2")
    name = "model.layers.1.mlp.experts.*.down_proj.weight"
    _, picture = drawn(plan, name)
    assert len(boxes(picture, "back")) == 2
    assert len(boxes(picture, "e0")) == len(boxes(picture, "e1")) == 1
    titles = {title.text for title in picture.iter("title")}
    assert {"ep 0: experts 0-3", "ep 1: experts 4-7"} <= titles
    assert division(plan, tensor_of(plan, name)).startswith("8 experts over ep=2, 4 each; in each, columns divided")


def test_a_replicated_weight_says_so(kjv_tiny: str) -> None:
    plan = dq.plan(kjv_tiny, mesh="dp=2")
    _, picture = drawn(plan, "lm_head.weight")
    assert "every rank" in [text.text for text in picture.iter("text")]
    assert division(plan, tensor_of(plan, "lm_head.weight")) == "replicated on all 2 ranks"


@pytest.mark.parametrize(
    ("partition", "runs"),
    [
        (even_partition(8, 2, 2), [(0, 4, (0,)), (4, 8, (1,))]),
        (Partition(8, (((0, 4),), ((0, 8),))), [(0, 4, (0, 1)), (4, 8, (1,))]),
        (Partition(8, (((0, 4), (0, 4)), ((4, 8),))), [(0, 4, (0,)), (4, 8, (1,))]),  # stored twice by one rank
        (Partition(8, (((0, 2), (4, 6)), ((2, 4), (6, 8)))), [(0, 2, (0,)), (2, 4, (1,)), (4, 6, (0,)), (6, 8, (1,))]),
    ],
)
def test_owners_cover_the_dim_once(partition: Partition, runs: list[tuple[int, int, tuple[int, ...]]]) -> None:
    assert list(owners(partition)) == runs


@pytest.mark.parametrize(
    ("shape", "dim", "rows", "columns"),
    [((6, 4), 0, 6, 4), ((6, 4), 1, 6, 4), ((6, 4, 3, 3), None, 6, 36), ((8, 6, 4), 2, 48, 4), ((8, 6, 4), 1, 8, 24)],
)
def test_tensors_of_any_shape_are_a_matrix(shape: tuple[int, ...], dim: int | None, rows: int, columns: int) -> None:
    matrix = Matrix.of(TensorPlan("w", shape, "bfloat16", "none", (), dim, None if dim is None else "p"))
    assert matrix is not None
    assert (matrix.rows, matrix.columns) == (rows, columns)


@pytest.mark.parametrize("shape", [(), (7,)])
def test_a_vector_is_not_drawn(shape: tuple[int, ...]) -> None:
    assert Matrix.of(TensorPlan("w", shape, "bfloat16", "none", ())) is None


def test_an_empty_weight_is_drawn_as_well(kjv_tiny: str) -> None:
    plan = dq.plan(kjv_tiny, mesh="tp=2")
    tensor = TensorPlan("w", (0, 4), "bfloat16", "none", ())
    matrix = Matrix.of(tensor)
    assert matrix is not None
    ElementTree.fromstring(weight_picture(plan, tensor, matrix, "w"))


def test_the_mesh_shows_every_rank_once(kjv_tiny: str) -> None:
    plan = dq.plan(kjv_tiny, mesh="dp=2,tp=2")
    picture = mesh_picture(plan)
    assert picture is not None
    titles = [title.text for title in ElementTree.fromstring(picture).iter("title")]
    assert titles == [f"rank {r}: dp {r // 2}, tp {r % 2}; node 0" for r in range(4)]
    assert mesh_picture(dataclasses.replace(plan, mesh=Mesh(dp=SHOWN_RANKS + 1))) is None


# -- memory ------------------------------------------------------------------------------------------------------------


def widths(plan: LoadPlan) -> dict[str, float]:
    """Per cent of the bar of the first group of ranks, by kind."""
    picture = memory_bars(plan, fold_ranks(plan), limit_of(plan))
    bar = picture[picture.index('class="bar"') :]
    return {kind: float(width) for kind, width in re.findall(r'<rect class="(\w+)" x="[\d.]+%" width="([\d.]+)%"', bar)}


def test_memory_is_drawn_against_the_limit(kjv_tiny: str) -> None:
    plan = dq.plan(kjv_tiny, quantization_config="nf4", mesh="tp=2", max_memory="2GiB")
    row, whole, (device, *_) = plan.memory[0], 2 << 30, plan.memory_for()
    assert 0 in device.ranks
    assert widths(plan) == pytest.approx(
        {
            "quantized": 100 * row.quantized / whole,
            "unquantized": 100 * row.unquantized / whole,
            "cache": 100 * device.cache / whole,
            "activations": 100 * device.activations / whole,
            "buffer": 100 * (device.loading - device.generating) / whole,
            "free": 90 - 100 * device.needed / whole,
            "reserved": 10,  # bitsandbytes methods leave a tenth
        },
        abs=0.01,
    )
    assert answer(plan, limit_of(plan))[:2] == ("yes", "It fits")


@pytest.mark.parametrize("share", [0.95, 1.5])
def test_what_does_not_fit_is_drawn_past_the_limit(kjv_tiny: str, share: float) -> None:
    """The command raises the error instead; a plan of an earlier version, or another machine's, may be so."""
    plan = dq.plan(kjv_tiny, quantization_config="nf4", mesh="tp=2", max_memory="2GiB")
    memory = int(max(device.needed for device in plan.memory_for()) / share)
    short = dataclasses.replace(plan, environment=dataclasses.replace(plan.environment, memory=memory))
    kind, verdict, numbers = answer(short, limit_of(short))
    assert (kind, verdict) == ("no", "It does not fit")
    assert "2 ranks lack up to" in numbers
    found = widths(short)
    assert "free" not in found
    assert sum(found.values()) == pytest.approx(100, abs=0.1)


def test_without_a_limit_the_page_says_so(kjv_tiny: str) -> None:
    plan = dq.plan(kjv_tiny, mesh="tp=2")
    assert limit_of(plan) is None
    assert answer(plan, None)[0] == "unknown"
    assert set(widths(plan)) == {"unquantized", "cache", "activations", "buffer"}
    from_json = dq.LoadPlan.from_json(plan.to_json())
    assert set(widths(from_json)) == {"unquantized", "buffer"}
    placed = dq.plan(kjv_tiny, device_map={"": "cuda:0"}, max_memory={"cuda:0": "1GiB"})
    assert limit_of(placed) is None
    assert "device map" in answer(placed, None)[2]


# -- text --------------------------------------------------------------------------------------------------------------


def test_text_is_escaped_and_markup_is_not() -> None:
    assert escaped("<b>&\"'") == "&lt;b&gt;&amp;&quot;&#x27;"
    assert tag("p", "<i>", tag("b", "x"), title='"') == '<p title="&quot;">&lt;i&gt;<b>x</b></p>'
    assert escaped(Html("<br>")) == "<br>"
    assert "&lt;td&gt;" in table(("<th>",), [("<td>",)], "<label>")
    assert "<th>" not in table(("<th>",), [], "<label>").replace("<th scope", "").replace("<thead>", "")


@pytest.mark.parametrize("text", ["a\u202eb", "a\nb", "a\x00b", "a\ud800b", "a\u200bb"])
def test_what_cannot_be_seen_is_written_out(text: str) -> None:
    shown = escaped(text)
    assert shown.isprintable()
    assert "\\" in shown
    shown.encode()
