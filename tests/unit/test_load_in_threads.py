"""Loads and plans of several threads of one process: each gets what it gets alone, and leaves the process as it was."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import distquant as dq
from distquant.garbage_collection import without_collector
from distquant.kernels import with_bitsandbytes
from distquant.kernels.reference.fp8 import FP8_MAX, fbgemm_scales
from distquant.kernels.reference.mxfp4 import e2m1_values
from distquant.loading.finish import IncompleteModel, check_complete
from distquant.quantization.algorithms.threads import on_one_thread, one_thread, set_own_threads

LOADS = [
    ("llama-gqa", "nf4-dq", "bfloat16"),
    ("llama-gqa", "int8", "float16"),
    ("qwen2-biases", "none", "float32"),
    ("qwen2-biases", "int4", "bfloat16"),
    ("llama-tied", "fp8", "bfloat16"),
    ("phi3-packed", "mxfp4", "float32"),
]
"""Family, method and dtype."""

ROUNDS = 2


def together(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """What functions return that begin at once, each in a thread of its own."""
    start = threading.Barrier(len(functions), timeout=300)

    def run(function: Callable[[], Any]) -> Any:
        start.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, functions))


def in_a_new_thread(function: Callable[[], Any]) -> Any:
    return together([function])[0]


def process_state() -> dict[str, Any]:
    """What belongs to all threads, and loads must leave alone."""
    return {
        "dtype": torch.get_default_dtype(),
        "threads": (torch.get_num_threads(), in_a_new_thread(torch.get_num_threads)),
        "init": (torch.nn.init.normal_, torch.nn.init.zeros_),
        "warnings": (warnings.showwarning, list(warnings.filters)),
        "collector": gc.isenabled(),
    }


def loaded(path: str, method: str, dtype: str) -> tuple[str, dict[str, torch.dtype], dict[str, list[float]]]:
    """Fingerprint, dtypes of parameters and buffers, and the buffers that no file holds."""
    model = dq.load(path, quantization_config=method, dtype=dtype)
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    computed = {name: buffer.tolist() for name, buffer in model.named_non_persistent_buffers()}
    return dq.fingerprint(model), {name: tensor.dtype for name, tensor in tensors.items()}, computed


def test_loads_at_once_are_what_each_is_alone(model_of: Callable[[str], str]) -> None:
    loads = [(model_of(family), method, dtype) for family, method, dtype in LOADS]
    alone = [loaded(*load) for load in loads]
    before = process_state()
    for _ in range(ROUNDS):
        found = together([lambda load=load: loaded(*load) for load in loads])
        assert found == alone
        assert process_state() == before


def test_plans_at_once_are_what_each_is_alone(model_of: Callable[[str], str], moe_of: Callable[..., str]) -> None:
    asked = [(model_of(family), method, dtype, "tp=2") for family, method, dtype in LOADS]
    asked += [(moe_of("mixtral"), "nf4", dtype, "ep=2") for dtype in ("bfloat16", "float32")]

    def planned(path: str, method: str, dtype: str, mesh: str) -> str:
        return dq.plan(path, quantization_config=method, dtype=dtype, mesh=mesh).digest

    alone = [planned(*one) for one in asked]
    before = process_state()
    for _ in range(ROUNDS):
        assert together([lambda one=one: planned(*one) for one in asked]) == alone
        assert process_state() == before


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Another default than torch's own: another thread may build a model while this one quantizes."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def test_a_load_does_not_ask_for_the_default_dtype(model_of: Callable[[str], str], default_dtype: torch.dtype) -> None:
    for family, method, dtype in LOADS:
        torch.set_default_dtype(torch.float32)
        alone = loaded(model_of(family), method, dtype)
        torch.set_default_dtype(default_dtype)
        assert loaded(model_of(family), method, dtype) == alone


def test_tables_and_scales_have_dtypes_of_their_own(default_dtype: torch.dtype) -> None:
    assert e2m1_values.__wrapped__(torch.device("cpu")).dtype == torch.float32
    least = torch.empty(1, dtype=torch.float32)
    fbgemm_scales(torch.zeros(1, dtype=torch.float32), least)
    assert least.item() == torch.tensor(1 / (FP8_MAX * 512), dtype=torch.float32).item()


def test_a_dtype_that_was_not_planned_is_named(model_of: Callable[[str], str]) -> None:
    model = dq.load(model_of("llama-tied"), quantization_config="nf4", dtype="bfloat16")
    plan = model.distquant.plan
    filled = [tensor.name for tensor in plan.tensors]
    check_complete(model, filled, plan, set(plan.tied))
    model.model.norm.to(torch.float32)
    with pytest.raises(IncompleteModel, match=r"1 tensors .* model\.norm\.weight \(torch\.float32 in place of bfloat1"):
        check_complete(model, filled, plan, set(plan.tied))


def test_a_number_of_threads_is_the_calling_threads_own() -> None:
    """A thread that first uses torch while another sums on one is not left with one."""
    usual, before = torch.get_num_threads(), process_state()["threads"]
    set_own_threads(usual + 1)
    try:
        with one_thread():
            assert (torch.get_num_threads(), in_a_new_thread(torch.get_num_threads)) == (1, before[1])
        assert torch.get_num_threads() == usual + 1
    finally:
        set_own_threads(usual)
    assert process_state()["threads"] == before


def test_a_sum_on_one_thread_leaves_the_numbers_of_threads_alone() -> None:
    usual, before = torch.get_num_threads(), process_state()["threads"]
    set_own_threads(usual + 1)
    try:
        assert on_one_thread(torch.get_num_threads) == 1
        assert torch.get_num_threads() == usual + 1
        with multiprocessing.get_context("fork").Pool(1) as pool:  # threads do not survive a fork
            assert pool.apply_async(on_one_thread, (torch.get_num_threads,)).get(60) == 1
    finally:
        set_own_threads(usual)
    assert process_state()["threads"] == before


def test_the_collector_rests_until_the_last_thread_is_done() -> None:
    assert gc.isenabled()
    first, second = without_collector(), without_collector()
    with first:
        second.__enter__()
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()


def test_kernels_that_switch_the_compiler_off_leave_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import eval_frame

    codes, absmax = with_bitsandbytes.quantize_4bit(torch.randn(64 * 64), 64, "nf4")
    before, real = eval_frame._stance.stance, with_bitsandbytes.functional.dequantize_4bit
    second_in, first_out, arrived = threading.Event(), threading.Event(), []

    def slow(*arguments: Any) -> Any:
        """Where two can be within, the first leaves first, and the second puts back what the first had set."""
        arrived.append(None)
        if len(arrived) == 1:
            second_in.wait(0.3)
        else:
            second_in.set()
            first_out.wait(0.3)
        return real(*arguments)

    def dequantize() -> None:
        with_bitsandbytes.dequantize_4bit(codes, absmax, 64, "nf4", (64, 64))
        first_out.set()

    monkeypatch.setattr(with_bitsandbytes.functional, "dequantize_4bit", slow)
    together([dequantize] * 2)
    assert len(arrived) == 2
    assert eval_frame._stance.stance == before
