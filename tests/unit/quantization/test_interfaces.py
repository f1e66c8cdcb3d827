"""A method has the interfaces that it implements, and no stub of another; names of 0.1 still work, with a warning."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import distquant
from distquant.environment import Environment
from distquant.model.description import ModelDescription
from distquant.quantization import Codec, Context, Encoder, ModuleFactory, PlainDecoder, QuantizedScheme, Scheme, Shard
from distquant.quantization.registry import METHODS, discover
from distquant.sharding.layout import Component, Layout, plain
from distquant.sharding.mesh import Mesh
from distquant.sharding.partition import Partition

FOLDER = Path(distquant.__file__).parent / "quantization"


def test_methods_that_convert_no_module_have_layout_rules_alone() -> None:
    alone = {name for name, scheme in discover().items() if not issubclass(scheme, (Codec, ModuleFactory, Encoder))}
    assert alone == {name for name, scheme in discover().items() if scheme.delegated} | {"none"}
    assert all(issubclass(scheme, QuantizedScheme) for name, scheme in discover().items() if name not in alone)


def test_abilities_are_those_of_the_interfaces() -> None:
    own = {name: scheme for name, scheme in discover().items() if issubclass(scheme, QuantizedScheme)}
    assert {name for name, scheme in own.items() if not scheme.quantizes()} == {"gguf"}
    assert {name for name, scheme in own.items() if issubclass(scheme, PlainDecoder)} == {"gguf"}
    assert all(scheme.reads_stored() for scheme in own.values())


def test_no_method_of_a_scheme_only_raises() -> None:
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("__"):
                body = [one for one in node.body if not isinstance(one, ast.Expr)]
                assert not (body and isinstance(body[0], ast.Raise)), f"{path}:{node.lineno}: {node.name}"


def test_methods_have_one_file_or_folder_each() -> None:
    there = {path.stem for path in (FOLDER / "methods").iterdir() if not path.name.startswith("__")}
    assert there == set(METHODS)


def context() -> Context:
    description = ModelDescription(
        model_type="", architecture="", params={}, tied={}, sources={}, unexpected=(), missing=(), linears={},
        attentions={}, embeddings=(), input_embedding=None, output_embedding=None, experts={}, tp_plan={}, ep_plan={},
        default_skip=(),
    )  # fmt: skip
    environment = Environment(packages={})
    return Context(environment=environment, mesh=Mesh(), description=description, device_map=None, prequantized=False)


def test_fields_of_0_1_can_be_read() -> None:
    shard = Shard("m.weight", (4, 4), "float32", 1, Partition(4, (((0, 4),),)))
    given = context()
    for record, old, value in (
        (shard, "dim", 1),
        (shard, "cut", shard.partition),
        (given, "facts", given.environment),
        (given, "skeleton", given.description),
    ):
        with pytest.warns(DeprecationWarning, match=rf"\.{old} is \w+ now; the old name goes with"):
            assert getattr(record, old) is value
    with pytest.raises(AttributeError, match="'Shard' object has no attribute 'cuts'"):
        _ = shard.cuts  # type: ignore[attr-defined]


def test_layouts_of_0_1_are_the_same() -> None:
    with pytest.warns(DeprecationWarning, match="distquant.layout.Component is distquant.sharding.layout.Component"):
        from distquant.layout import Component as Old
    with pytest.warns(DeprecationWarning) as caught:
        old = Old(name="x", dtype="int8", spans=(1, 32), words=(1, 2), turned=True, cuts=(16,), gathered=True)
    assert {str(one.message).split(" is ")[0] for one in caught} == {
        f"Component({word}=...)" for word in ("spans", "words", "turned", "cuts", "gathered")
    }
    assert old == Component(
        name="x",
        dtype="int8",
        block_shape=(1, 32),
        stored_per_block=(1, 2),
        transposed=True,
        preferred_alignments=(16,),
        replicated=True,
    )
    with pytest.raises(ImportError, match="Nothing"):
        from distquant.layout import Nothing  # noqa: F401


def old_base() -> Any:
    with pytest.warns(DeprecationWarning, match=r"distquant\.schemes\.Scheme is distquant\.quantization\.Quant"):
        from distquant.schemes import Scheme as Old
    return Old


def test_a_scheme_of_0_1_is_called_by_the_new_names() -> None:
    calls: list[str] = []
    base = old_base()
    with pytest.warns(DeprecationWarning) as caught:

        class Written(base):  # type: ignore[misc]
            name = "written for 0.1"

            def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
                return plain(dtype)

            def module(self, linear: Any, shard: Any) -> Any:
                return linear

            def encode(self, name: str, rows: Any, out: Any, ops: Any) -> None:
                calls.append("encode")

            def complete(self, shard: Any, module: Any, parts: Any, ops: Any) -> None:
                calls.append("complete")

            def restore(self, shard: Any, module: Any, parts: Any, whole: Any) -> None:
                calls.append("restore")

            def entire(self, name: str, shape: tuple[int, int]) -> int:
                return 7 + super().entire(name, shape)

            def flowing(self, name: str, shape: tuple[int, int], dtype: str) -> tuple[Component, ...]:
                assert self.statistics(None) == frozenset()
                return super().flowing(name, shape, dtype)

    own = (str(one.message).partition("Written.")[2].partition(" now")[0] for one in caught)
    assert set(own) == {
        "complete is load_encoded",
        "restore is load_prequantized",
        "entire is whole_weight_workspace",
        "flowing is encoded_components",
    }
    assert issubclass(Written, Scheme) and Written.quantizes() and Written.reads_stored()
    scheme = Written(None)
    scheme.load_encoded(None, None, {}, None)
    scheme.load_prequantized(None, None, {}, frozenset())
    assert calls == ["complete", "restore"]
    assert scheme.whole_weight_workspace("m.weight", (4, 4)) == 7
    assert [one.name for one in scheme.encoded_components("m.weight", (4, 4), "float32")] == [""]


def test_a_scheme_of_0_1_need_not_read_stored_weights() -> None:
    class Written(old_base()):  # type: ignore[misc]
        """Nothing of its own."""

    assert not Written.reads_stored()
