"""FBGEMM's product: when it is taken, what it is given, and that one which is wrong is passed over.

Its operation exists on CUDA only. In its place stands what it computes, under the schema of fbgemm-gpu-genai 1.8.0.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from distquant.quantization.linear import fbgemm_matmul, float8_matmul
from distquant.quantization.linear.float8_matmul import Float8Kernel, Float8Rows, float8_rows_matmul, taken

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
SCHEMA = (
    "f8f8bf16_rowwise(Tensor XQ, Tensor WQ, Tensor x_scale, Tensor w_scale, Tensor? bias=None, "
    "bool use_fast_accum=True) -> Tensor"
)

Product = Callable[..., Tensor]


def right(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None = None, fast: bool = True):
    return ((x.float() * x_scale.view(-1, 1)) @ (w.float() * w_scale.view(-1, 1)).t()).bfloat16()


def without_scales(x: Tensor, w: Tensor, *_: object) -> Tensor:
    return (x.float() @ w.float().t()).bfloat16()


def failing(*_: object) -> Tensor:
    raise RuntimeError("cutlass cannot run")


@pytest.fixture
def stands_in() -> Iterator[Callable[[Product], None]]:
    library = torch.library.Library("fbgemm", "FRAGMENT")
    library.define(SCHEMA)
    yield lambda product: library.impl("f8f8bf16_rowwise", product, "CPU")
    library._destroy()


@pytest.fixture(autouse=True)
def nothing_is_remembered() -> Iterator[None]:
    cached = (fbgemm_matmul.why_not, fbgemm_matmul._not_loaded)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def test_it_is_tried(stands_in) -> None:
    stands_in(right)
    assert fbgemm_matmul.tried(CPU) is None


@pytest.mark.parametrize(
    ("product", "reason"),
    [(without_scales, r"f8f8bf16_rowwise is wrong by 0\.\d+ on cpu"), (failing, r"f8f8bf16_rowwise fails \(.*cutlass")],
)
def test_one_that_does_not_give_the_product_is_passed_over(stands_in, product, reason) -> None:
    stands_in(product)
    assert (found := fbgemm_matmul.tried(CPU)) is not None
    assert re.match(reason, found), found


def test_an_operation_that_is_not_there_is_passed_over() -> None:
    assert "f8f8bf16_rowwise fails" in (fbgemm_matmul.tried(CPU) or "")


@pytest.mark.parametrize("scales", [1, 48])
def test_it_is_given_what_scaled_mm_is(stands_in, monkeypatch, scales) -> None:
    """One scale for each row of activations, and of the weight, also where it has one for all."""
    stands_in(right)
    made = torch.Generator().manual_seed(1)
    codes = torch.randn(48, 64, generator=made).to(torch.float8_e4m3fn)
    weight = Float8Rows(codes, torch.rand(scales, 1, generator=made) + 0.5)
    x = torch.randn(2, 5, 64, generator=made).bfloat16()
    by_torch = float8_rows_matmul(x, weight)
    monkeypatch.setattr(float8_matmul, "taken", lambda kernel, device: (Float8Kernel.FBGEMM, ""))
    found = float8_rows_matmul(x, weight)
    assert (found.dtype, found.shape) == (torch.bfloat16, (2, 5, 48))
    torch.testing.assert_close(found, by_torch, rtol=2**-7, atol=1e-5)
    assert float8_rows_matmul(x[:0], weight).shape == (0, 5, 48)


@pytest.mark.parametrize(
    ("version", "reason"),
    [(None, "fbgemm-gpu-genai is not installed"), ("1.9.0", "fbgemm-gpu-genai 1.9.0 is not for torch 2.13.0")],
)
def test_why_it_is_not_taken(monkeypatch, version, reason) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert taken(Float8Kernel.SCALED_MM, GPU) == (Float8Kernel.SCALED_MM, reason)


def test_where_it_cannot_be_taken(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert taken(Float8Kernel.SCALED_MM, GPU)[1] == "f8f8bf16_rowwise needs compute capability 9.0"
    assert taken(Float8Kernel.SCALED_MM, CPU) == (Float8Kernel.SCALED_MM, "")
    assert taken(Float8Kernel.TILES, GPU) == (Float8Kernel.TILES, "")


def test_it_is_taken_where_it_runs(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(fbgemm_matmul, "_not_loaded", lambda: None)
    monkeypatch.setattr(fbgemm_matmul, "tried", lambda device: None)
    assert taken(Float8Kernel.SCALED_MM, GPU) == (Float8Kernel.FBGEMM, "")
