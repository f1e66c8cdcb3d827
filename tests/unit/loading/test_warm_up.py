"""The thread that compiles kernels: what it encodes, and what becomes of its errors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import distquant as dq
from distquant.kernels import reference
from distquant.kernels.choice import Choice, Kernel
from distquant.loading.loader import scheme_of
from distquant.loading.warm_up import warm_up, warming_up

META = torch.device("meta")


class Recording:
    """The reference's kernels, which note the shapes that they are given."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.error = error

    def __getattr__(self, name: str) -> Any:
        def call(weight: torch.Tensor, *args: Any, **options: Any) -> Any:
            self.shapes.append(tuple(weight.shape))
            if self.error is not None:
                raise self.error
            return getattr(reference, name)(weight, *args, **options)

        return call


def of(path: str, method: str | None) -> tuple[Any, Any]:
    plan = dq.plan(path, quantization_config=method)
    return plan, scheme_of(plan)


def test_a_few_rows_of_each_width_are_encoded(kjv_tiny: str) -> None:
    plan, scheme = of(kjv_tiny, "int8")
    widths = {tensor.shape[1] for tensor in plan.tensors if tensor.scheme != "none"}
    kernels = Recording()
    assert warm_up(plan, scheme, META, kernels) == len(widths) > 1
    assert set(kernels.shapes) == {(16, width) for width in widths}


def test_blocks_of_rows_are_whole(kjv_tiny: str) -> None:
    plan, scheme = of(kjv_tiny, "fp8")
    kernels = Recording()
    warm_up(plan, scheme, META, kernels)
    assert kernels.shapes
    assert {rows for rows, _ in kernels.shapes} == {128}


@pytest.mark.parametrize("method", ["hqq", "none"])
def test_there_may_be_nothing_to_compile(kjv_tiny: str, method: str) -> None:
    plan, scheme = of(kjv_tiny, method if method != "none" else None)
    kernels = Recording()
    with warming_up(plan, scheme, META, Choice(Kernel.TRITON, kernels, "")):
        pass
    assert kernels.shapes == []


def test_only_kernels_that_are_compiled_are_warmed_up(kjv_tiny: str) -> None:
    kernels = Recording()
    with warming_up(*of(kjv_tiny, "int8"), META, Choice(Kernel.REFERENCE, kernels, "")):
        pass
    assert kernels.shapes == []


def test_an_error_is_raised_where_the_load_ends(kjv_tiny: str) -> None:
    steps = SimpleNamespace(loaded=False)
    choice = Choice(Kernel.TRITON, Recording(ValueError("does not compile")), "")
    with pytest.raises(ValueError, match="does not compile"), warming_up(*of(kjv_tiny, "int8"), META, choice):
        steps.loaded = True
    assert steps.loaded


def test_the_loads_own_error_comes_first(kjv_tiny: str) -> None:
    choice = Choice(Kernel.TRITON, Recording(ValueError("does not compile")), "")
    with pytest.raises(KeyError, match="read"), warming_up(*of(kjv_tiny, "int8"), META, choice):
        raise KeyError("read")


def test_memory_that_the_load_needs_is_left_to_it(kjv_tiny: str) -> None:
    kernels = Recording(torch.OutOfMemoryError("none left"))
    with warming_up(*of(kjv_tiny, "int8"), META, Choice(Kernel.TRITON, kernels, "")):
        pass
    assert warm_up(*of(kjv_tiny, "int8"), META, kernels) == 1
