"""`plan --html`: one page without a network. It has all of the plan, runs nothing of a checkpoint, and is searched."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from chromium import BROWSER, NO_BROWSER, POLICY, browse, dom, drive
from cli_runs import Command

import distquant as dq
from distquant.cli.page import plan_html
from distquant.model.description import Source
from distquant.planning import LoadPlan
from distquant.planning.load_plan import Rule

ROOT = Path(__file__).resolve().parents[2]
in_browser = pytest.mark.skipif(BROWSER is None, reason=NO_BROWSER)


class Parsed(HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._last = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._last = tag

    def handle_data(self, data: str) -> None:
        self.text += "" if self._last in ("style", "script") else data


@pytest.fixture(scope="module")
def tiny(kjv_tiny: str) -> LoadPlan:
    return dq.plan(kjv_tiny, quantization_config="nf4", mesh="tp=2")


@pytest.fixture(scope="module")
def page(tiny: LoadPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a small plan."""
    path = tmp_path_factory.mktemp("page") / "plan.html"
    path.write_text(plan_html(tiny), "utf-8")
    return path


# -- what is on it -----------------------------------------------------------------------------------------------------


def test_plan_as_a_page(kjv_tiny: str, command: Command, workdir: Path) -> None:
    assert command("plan", kjv_tiny, "--quant", "nf4", "--mesh", "tp=2", "--html", "plan.html").code == 0
    text = Parsed((workdir / "plan.html").read_text("utf-8")).text
    plan = dq.plan(kjv_tiny, quantization_config="nf4", mesh="tp=2")
    names = (*(rule.pattern for rule in plan.rules), *(tensor.name for tensor in plan.tensors), *plan.partitions)
    for shown in (plan.digest, plan.model, plan.architecture, "bitsandbytes nf4", "tp=2", *names):
        assert shown in text
    assert "layers 0-3, all alike" in text
    assert "ranks 0-1" in text
    assert "in shares" in text and "scattered" in text and "dealt" not in text


def test_the_answer_comes_first(kjv_tiny: str) -> None:
    plan = dq.plan(kjv_tiny, quantization_config="nf4", mesh="tp=2", max_memory="2GiB")
    text = Parsed(plan_html(plan)).text
    order = [
        "It fits",
        "Model",
        "Method",
        "Mesh",
        "left unquantized",
        "checked at load",
        "Memory of each rank",
        "Layers",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "options",
    [
        {"quantization_config": None},
        {"mesh": "dp=2,tp=3", "quantization_config": "nf4-dq"},
        {"mesh": "tp=2", "quantization_config": "int8"},
        {"device_map": {"": "cuda:0", "model.layers.3": "cuda:1"}},
        {"mesh": "dp=600"},
    ],
    ids=str,
)
def test_any_plan_has_a_page_with_every_tensor_and_rank(kjv_tiny: str, options: dict[str, object]) -> None:
    plan = dq.plan(kjv_tiny, **options)
    parsed = Parsed(plan_html(plan))
    for tensor in plan.tensors:
        assert tensor.name in parsed.text
    opened = [tag for tag, _ in parsed.tags]
    assert opened.count("table") >= 3
    if plan.device_map:
        assert "cuda:1" in parsed.text


def test_more_tensors_than_a_table_holds_are_in_groups(tiny: LoadPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distquant.cli.page.tables.MOST_TENSORS", 10)
    text = Parsed(plan_html(tiny)).text
    assert f"{len(tiny.tensors)} in groups" in text
    assert "model.layers.*.mlp.down_proj.weightlayers 0-3" in text


def test_many_nodes_are_counted_and_few_are_listed(kjv_tiny: str) -> None:
    assert "node 0: ranks 0-7; node 1: ranks 8-15" in plan_html(dq.plan(kjv_tiny, mesh="dp=16"))
    assert "<li>9 nodes of 8 ranks each</li>" in plan_html(dq.plan(kjv_tiny, mesh="dp=72"))


def test_layers_that_differ_in_everything_name_no_tensor(kjv_tiny: str) -> None:
    plan = dq.plan(kjv_tiny, device_map={"": "cuda:0", "model.layers.3": "cuda:1"})
    assert "layer 3: 9 tensors and 0.2 million parameters each; differs from other layers in all tensors" in (
        Parsed(plan_html(plan)).text
    )


def test_pages_of_skipped_methods_warn(tiny: LoadPlan) -> None:
    config = {"quant_method": "someones_own"}
    notes = ("left unquantized: 1", "SKIPPED: no scheme", "dropped: 3 tensors")
    plan = dataclasses.replace(tiny, quantization_config=config, prequantized=True, notes=notes)
    items = re.findall(r'<li class="(\w+)"><b>([^<]*)', plan_html(plan))
    assert items[:3] == [("warning", "SKIPPED"), ("warning", "dropped"), ("note", "left unquantized")]


# -- one file, no network ----------------------------------------------------------------------------------------------

FETCHING = {"src", "srcset", "data", "poster", "action", "background", "href", "xlink:href", "style"}


def test_the_page_stands_alone(page: Path) -> None:
    text = page.read_text("utf-8")
    for tag, attributes in Parsed(text).tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            assert name not in FETCHING or (value or "").startswith("#"), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.S)
    assert "url(" not in style and "@import" not in style


@pytest.mark.wide
@pytest.mark.parametrize(("shape", "mesh"), [("deepseek-v3", "ep=8,tp=2"), ("deepseek-v3", "ep=32,tp=16")])
def test_a_page_of_deepseek_v3_is_small(tmp_path: Path, shape: str, mesh: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "shapes.py"), shape, str(tmp_path / shape)], check=True)
    page = plan_html(dq.plan(tmp_path / shape, mesh=mesh))
    assert len(page.encode()) < 1_000_000
    assert "layers 0-2, all alike" in Parsed(page).text
    assert "layers 3-60, all alike" in Parsed(page).text


# -- hostile text ------------------------------------------------------------------------------------------------------

HOSTILE = (
    '<img src=x onerror="document.title=`RAN`">',
    "</script><script>document.title='RAN'</script>",
    "</title></style></code></td></table><svg onload=\"document.title='RAN'\">",
    "\"' onfocus=document.title='RAN' autofocus tabindex=0 x=\"",
    "<!--",
    "]]><script>document.title='RAN'</script>",
    "\u202egnp.exe",
    "a\x00b\ud800",
)


def hostile_plan(plan: LoadPlan) -> LoadPlan:
    """A plan with hostile text wherever text is."""
    text = "".join(HOSTILE)
    tensors = [
        *(dataclasses.replace(t, name=f"{name}.{t.name}") for t, name in zip(plan.tensors, HOSTILE, strict=False)),
        *plan.tensors[len(HOSTILE) :],
        dataclasses.replace(plan.tensors[0], name=text, dtype=text, scheme=text, sources=(Source(text, text),)),
        dataclasses.replace(plan.tensors[0], name=f"{text}.1.x", shape=(4,), shard_dim=None, partition=None),
    ]
    return dataclasses.replace(
        plan,
        model=text,
        model_type=text,
        architecture=text,
        tensors=tuple(tensors),
        partitions={**plan.partitions, text: next(iter(plan.partitions.values()))},
        rules=(Rule(text, text, text, text, 1),),
        notes=(text, f"dropped: {text}"),
        check_at_load=(text,),
        quantization_config={"quant_method": text, text: text},
        device_map={text: text, "": "cpu"},
    )


TITLE = re.compile(r"<head>.*?<title>(.*?)</title>", re.S)


def tags_of(page: str) -> set[str]:
    return {tag for tag, _ in Parsed(page).tags}


def test_hostile_text_makes_no_tags_and_no_attributes(tiny: LoadPlan) -> None:
    parsed = Parsed(plan_html(hostile_plan(tiny)))
    assert {tag for tag, _ in parsed.tags} <= tags_of(plan_html(tiny)) | {"data"}
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert all(text in parsed.text for text in HOSTILE[:6])
    assert "\\u202egnp.exe" in parsed.text and "\u202e" not in parsed.text
    parsed.text.encode()


@in_browser
@pytest.mark.parametrize("has_policy", [True, False], ids=["as-it-is", "without-its-policy"])
def test_hostile_text_does_not_run_in_a_browser(tiny: LoadPlan, tmp_path: Path, has_policy: bool) -> None:
    text = plan_html(hostile_plan(tiny))
    path = tmp_path / "hostile.html"
    path.write_text(text if has_policy else POLICY.sub("", text), "utf-8")
    after = dom(path)
    before, now = (unescape(TITLE.search(each)[1]) for each in (text, after))  # type: ignore[index]
    assert now == before, "a script changed it"
    assert tags_of(after) <= tags_of(plan_html(tiny)) | {"tbody", "label", "input", "output", "button"}


@in_browser
def test_a_browser_would_run_it_if_it_were_not_escaped(tmp_path: Path) -> None:
    """The check above can fail: the same text as markup does run."""
    path = tmp_path / "open.html"
    path.write_text(f"<!doctype html><title>x</title><p>{HOSTILE[1]}", "utf-8")
    assert "<title>RAN</title>" in dom(path)


@in_browser
def test_the_policy_stops_a_script_that_is_in_the_page(page: Path, tmp_path: Path) -> None:
    path = tmp_path / "injected.html"
    text = page.read_text("utf-8").replace("</body>", "<script>document.title='RAN'</script></body>")
    path.write_text(text, "utf-8")
    assert "RAN</title>" not in dom(path)


@in_browser
def test_a_checkpoint_with_a_hostile_name_does_not_run(
    copy_of: Callable[[str], Path], command: Command, workdir: Path
) -> None:
    folder = copy_of("llama-gqa")
    for name in HOSTILE[:3]:
        add_tensor(folder, name)
    assert command("plan", folder, "--html", "plan.html").code == 0
    after = dom(workdir / "plan.html")
    assert "onerror" in after, "a note names it"
    assert "RAN</title>" not in after
    assert "<img" not in after


def add_tensor(folder: Path, name: str) -> None:
    """Adds a tensor to a checkpoint of one file, as its first bytes."""
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    for key, info in header.items():
        if key != "__metadata__":
            info["data_offsets"] = [offset + 4 for offset in info["data_offsets"]]
    header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4) + whole[8 + length :])


# -- what it does ------------------------------------------------------------------------------------------------------


@in_browser
def test_tables_are_searched_by_words_in_any_order(page: Path) -> None:
    shown = drive(
        page,
        """
        const box = document.querySelector('[aria-label=Tensors]');
        const input = box.parentElement.querySelector('input');
        input.value = 'DOWN_PROJ layers.2';
        input.dispatchEvent(new Event('input'));
        const rows = Array.from(box.querySelectorAll('tbody tr')).filter((row) => !row.hidden);
        answer(rows.map((row) => row.cells[0].textContent).join() + ' / ' + input.parentElement.textContent);
        """,
    )
    assert re.fullmatch(r"model\.layers\.2\.mlp\.down_proj\.weight / Search1 of \d+ rows", shown)


@in_browser
def test_tables_are_sorted_by_numbers_and_bytes(tiny: LoadPlan, tmp_path: Path) -> None:
    sizes = [3 << 30, 5 << 20, 40 << 20]  # 3.00 GiB, 5.00 MiB, 40.00 MiB: their texts are in another order
    memory = tuple(dataclasses.replace(tiny.memory[0], rank=i, read=size) for i, size in enumerate(sizes))
    plan = dataclasses.replace(dq.plan(tiny.model, mesh="dp=3"), memory=memory)
    path = tmp_path / "plan.html"
    path.write_text(plan_html(plan), "utf-8")
    script = """
        const table = document.querySelector('[aria-label=Ranks] table');
        const head = Array.from(table.tHead.rows[0].cells).find((cell) => cell.textContent === 'to read');
        const ranks = () => Array.from(table.tBodies[0].rows, (row) => row.cells[0].textContent).join('');
        const said = [];
        for (let i = 0; i < 2; i++) { head.firstChild.click(); said.push(ranks() + head.getAttribute('aria-sort')); }
        answer(said.join());
        """
    assert drive(path, script) == "120ascending,021descending"


@in_browser
def test_everything_is_reached_by_keyboard(page: Path) -> None:
    """Each thing that does something is a button, an input, a summary or a link, and none is taken out of the order."""
    script = """
        const active = Array.from(document.querySelectorAll('a, button, input, summary, [tabindex]'));
        const regions = document.querySelectorAll('.table:not([tabindex="0"])').length;
        const unnamed = Array.from(document.querySelectorAll('svg[role=img]'))
            .filter((svg) => !svg.getAttribute('aria-label') && !svg.querySelector(':scope > title')).length;
        const kinds = new Set(active.map((each) => each.tagName.toLowerCase()));
        document.querySelectorAll('details').forEach((each) => { each.open = true; });
        const out = active.filter((each) => { each.focus(); return document.activeElement !== each; }).length;
        answer([regions, unnamed, out, ...[...kinds].sort()].join());
        """
    assert drive(page, script) == "0,0,0,a,button,div,input,section,summary"


@in_browser
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window(page: Path, width: int) -> None:
    script = f"""
        const frame = document.createElement('iframe');
        frame.style.width = '{width}px';
        frame.style.height = '4000px';
        frame.srcdoc = document.documentElement.outerHTML.replace(/<script[^]*?<.script>/g, '');
        frame.onload = () => {{
          const root = frame.contentDocument.documentElement;
          answer(root.clientWidth + ' ' + root.scrollWidth);
        }};
        document.body.append(frame);
        """
    client, scroll = map(int, drive(page, script).split())
    assert scroll <= client <= width


@in_browser
def test_pages_are_dark_where_the_reader_wants_it(page: Path) -> None:
    script = "answer(getComputedStyle(document.body).backgroundColor)"
    assert drive(page, script) == "rgb(255, 255, 255)"
    style = page.read_text("utf-8")
    dark = page.with_name("dark.html")
    dark.write_text(style.replace("(prefers-color-scheme: dark)", "(prefers-color-scheme: light)"), "utf-8")
    assert drive(dark, script) == "rgb(18, 24, 31)"


@in_browser
def test_it_prints(page: Path, tmp_path: Path) -> None:
    target = tmp_path / "plan.pdf"
    browse(page, f"--print-to-pdf={target}", "--no-pdf-header-footer")
    pages = re.findall(rb"/Type\s*/Page\b", target.read_bytes())
    assert 1 <= len(pages) <= 5, "tables that are closed are not printed"
