"""Choice of kernels for a device: the kernels, the reasons, and errors for what cannot run."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from absent import run_without
from kernel_cases import same
from kernel_samples import random, specials

from distquant.errors import InputError
from distquant.kernels import reference, with_bitsandbytes
from distquant.kernels.choice import Choice, Kernel, choose

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


def missing(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Makes an import of `module` fail, also where it was imported before."""
    package, _, name = module.rpartition(".")
    monkeypatch.setitem(sys.modules, module, None)
    if package in sys.modules:
        monkeypatch.delattr(sys.modules[package], name, raising=False)


def test_auto_on_the_cpu_is_native_and_names_the_instruction_set():
    cpu = pytest.importorskip("distquant.kernels.cpu", reason="the native kernels were not built")
    choice = choose("auto", CPU)
    assert (choice.kernel, choice.ops) == (Kernel.CPU, cpu)
    name = {"avx512": "AVX-512", "avx2": "AVX2", "portable": "no AVX2"}[cpu.isa()]
    count = torch.get_num_threads()
    assert choice.reason == f"cpu: {name}, {count} thread{'s' * (count > 1)}"


def test_auto_without_the_native_kernels_is_the_reference_and_says_why(monkeypatch):
    missing(monkeypatch, "distquant.kernels.cpu")
    choice = choose(Kernel.AUTO, CPU)
    assert (choice.kernel, choice.ops) == (Kernel.REFERENCE, reference)
    assert "slow, because" in choice.reason
    with pytest.raises(InputError, match=r"kernel: 'cpu' is not available.*or take 'reference'"):
        choose("cpu", CPU)


def test_the_library_that_was_not_built_says_what_to_do(monkeypatch, tmp_path):
    library = pytest.importorskip("distquant.kernels.cpu.library", reason="the native kernels were not built")
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    with pytest.raises(ImportError, match=r"were not built .*Install distquant again where a C\+\+17 compiler"):
        library._load()


@pytest.mark.parametrize("device", ["cpu", "meta", "cuda:0"])
def test_the_reference_runs_anywhere(device):
    choice = choose("reference", torch.device(device))
    assert (choice.kernel, choice.ops) == (Kernel.REFERENCE, reference)
    assert choice.reason == f"reference: plain torch on {device}"


def test_auto_on_other_devices_is_the_reference():
    assert choose("auto", torch.device("mps")).kernel is Kernel.REFERENCE


def test_auto_on_cuda_is_triton(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    choice = choose("auto", CUDA)
    assert choice.kernel is Kernel.TRITON
    assert choice.ops.__name__ == "distquant.kernels.gpu"
    assert choice.reason == f"triton: NVIDIA Test, Triton {triton.__version__}"


def test_auto_on_cuda_never_falls_back(monkeypatch):
    missing(monkeypatch, "triton")
    with pytest.raises(InputError, match="kernel: 'triton' is not available"):
        choose("auto", CUDA)


@pytest.mark.parametrize(
    ("kernel", "device", "message"),
    [
        ("cpu", CUDA, "'cpu' cannot quantize on cuda:0"),
        ("triton", torch.device("meta"), "'triton' cannot quantize on meta"),
        ("bitsandbytes", torch.device("mps"), "'bitsandbytes' cannot quantize on mps"),
        ("fast", CPU, "unknown kernels 'fast'. Take one of auto, reference, cpu, triton, bitsandbytes"),
    ],
)
def test_what_cannot_run_is_refused(kernel, device, message):
    with pytest.raises(InputError, match=message):
        choose(kernel, device)


def test_triton_on_the_cpu_needs_its_interpreter(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(InputError, match=r"'triton' cannot quantize on cpu\. Take 'auto', 'cpu'"):
        choose("triton", CPU)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert "interpreted on the CPU" in choose("triton", CPU).reason


def test_bitsandbytes_that_is_not_installed(monkeypatch):
    missing(monkeypatch, "bitsandbytes")
    with pytest.raises(InputError, match="'bitsandbytes' is not available"):
        choose("bitsandbytes", CPU)


def chosen() -> list[Choice]:
    made = [choose("reference", CPU), choose("bitsandbytes", CPU)]
    for name in ("cpu", "triton"):
        module = pytest.importorskip({"cpu": "distquant.kernels.cpu", "triton": "distquant.kernels.gpu"}[name])
        made.append(Choice(Kernel(name), module, ""))
    return made


def test_all_kernels_offer_the_same_functions():
    offered = {name for name in dir(reference) if name.startswith(("quantize_", "dequantize_", "encode_"))}
    assert len(offered) == 17
    for choice in chosen():
        assert not [name for name in offered if not callable(getattr(choice.ops, name, None))], choice


def test_the_choice_imports_only_what_it_chooses(tmp_path):
    code = """
import sys, torch
from distquant.kernels.choice import choose
choose("auto", torch.device("cpu"))
print([name for name in ("triton", "bitsandbytes", "distquant.kernels.gpu") if name in sys.modules])
"""
    done = run_without((), tmp_path / "packages", code)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_is_equal_to_the_reference_on_the_cpu(quant_type, dtype):
    for count, blocksize in ((640, 64), (650, 64), (64, 256), (8192, 4096), (2, 64)):
        source = random(count, dtype, count)
        codes, absmax = with_bitsandbytes.quantize_4bit(source, blocksize, quant_type)
        same((codes, absmax), reference.quantize_4bit(source, blocksize, quant_type))
        for shape in ((count,), (count - 1,), (2, count // 2)):
            given = (codes, absmax, blocksize, quant_type, shape, dtype)
            same(with_bitsandbytes.dequantize_4bit(*given), reference.dequantize_4bit(*given))
    rows = torch.cat([random(96, dtype, 1), specials(96, dtype, 2)]).view(6, 32)
    same(with_bitsandbytes.quantize_int8_rows(rows), reference.quantize_int8_rows(rows))


def test_bitsandbytes_second_level_and_outputs_in_place():
    from bitsandbytes.functional import create_dynamic_map

    source, code = random(1000, torch.float32, 1), create_dynamic_map()
    codes, absmax = torch.empty(1000, dtype=torch.uint8), torch.empty(4)
    found = with_bitsandbytes.quantize_blockwise(source, code, 256, codes=codes, absmax=absmax)
    same(found, reference.quantize_blockwise(source, code, 256))
    assert (found[0].data_ptr(), found[1].data_ptr()) == (codes.data_ptr(), absmax.data_ptr())
    given = (codes, absmax, code, 256)
    same(with_bitsandbytes.dequantize_blockwise(*given), reference.dequantize_blockwise(*given))
    packed = torch.empty(500, dtype=torch.uint8)
    assert with_bitsandbytes.quantize_4bit(source, 64, "nf4", codes=packed)[0].data_ptr() == packed.data_ptr()
    with pytest.raises(ValueError, match="33 codes do not fill whole bytes"):
        with_bitsandbytes.quantize_4bit(torch.ones(33), 64, "nf4")


@pytest.mark.parametrize(
    "name", ["quantize_fp8", "dequantize_fp8", "quantize_groups", "dequantize_groups", "quantize_mxfp4"]
)
def test_what_bitsandbytes_does_not_have_is_refused(name):
    with pytest.raises(ValueError, match=f"bitsandbytes has no {name}: use kernel 'auto'"):
        getattr(with_bitsandbytes, name)(torch.full((4, 4), math.pi), (None, None))
