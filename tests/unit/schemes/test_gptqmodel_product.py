"""Products by gptqmodel's kernels: what they are given, which is taken, and what a model keeps beside them.

Most tests have stand-ins for the kernels, which compute from the definition of the stored words. Those at the end run
gptqmodel itself, on a CPU, and are skipped where it is missing. `make test` does not install it, because version 7.6.0
wants another numpy than the rest is tested with; by hand: `pip install --no-deps gptqmodel==7.6.0`, then `pip install
-c constraints.txt torch device-smi pypcre tokenicer logbar defuser datasets threadpoolctl protobuf pillow ninja`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from packed_words import Kind, dense_weight, make_weight
from torch import nn

import distquant as dq
from distquant.config import AutoRoundConfig, AwqConfig, GptqConfig
from distquant.errors import InputError
from distquant.options import Forward
from distquant.planning.cuts import Cut
from distquant.schemes import Shard, gptqmodel_product, scheme_for
from distquant.schemes.gptqmodel_product import TOLERANCE, missing, take_kernel, why_not
from distquant.schemes.packed_groups import PackedGroupsScheme
from distquant.schemes.quantized_linear import QuantizedLinear

CPU = torch.device("cpu")
SHAPE = (64, 128)
IDS = torch.tensor([[3, 17, 5, 40, 8, 2, 11, 29]])
RTN = {"quant_method": "gptq", "bits": 4, "group_size": 32}


def scheme_of(kind: Kind) -> PackedGroupsScheme:
    cls = {"gptq": GptqConfig, "awq": AwqConfig, "auto-round": AutoRoundConfig}[kind.method]
    found = scheme_for(cls.from_dict(kind.config([])))
    assert isinstance(found, PackedGroupsScheme)
    return found


def module_of(kind: Kind, dtype: str = "bfloat16", dim: int | None = None, rank: int = 0) -> QuantizedLinear:
    """A filled module; with `dim` one of two ranks' part of it."""
    scheme, stored = scheme_of(kind), make_weight(SHAPE, kind, 1, torch.float16)
    cut = None if dim is None else Cut(SHAPE[dim], (((0, SHAPE[dim] // 2),), ((SHAPE[dim] // 2, SHAPE[dim]),)))
    shard = Shard("m.weight", SHAPE, dtype, dim, cut, rank)
    parts = {}
    for component in scheme.layout(shard.name, SHAPE, dtype).components:
        whole = stored[component.name]
        if cut is not None:
            start, stop = cut.segments(rank)[0]
            if component.name == "g_idx":
                whole = whole[start:stop] if dim == 1 else whole
            elif (found := component.slice(SHAPE, dim, start, stop)) is not None:
                whole = whole.narrow(found[0], found[1], found[2] - found[1])
        parts[component.name] = whole.contiguous().view(-1)
    module = QuantizedLinear(scheme, shard, None)
    module.take(scheme.adopt(shard, parts, frozenset()))
    return module


def inputs(module: QuantizedLinear, seed: int = 0) -> torch.Tensor:
    made = torch.randn(2, 3, module.in_features, generator=torch.Generator().manual_seed(seed))
    return made.to(getattr(torch, module.shard.dtype))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


# -- stand-ins ---------------------------------------------------------------------------------------------------------


class Keeps(nn.Module):
    """A kernel for GPTQ's second version that multiplies the words as they are stored."""

    REQUIRES_FORMAT_V2 = True

    def __init__(self, *, bits: int, group_size: int, in_features: int, out_features: int, **asked: Any):
        super().__init__()
        self.kind, self.asked = Kind(bits=bits, group=group_size, v1=False), asked
        groups = 1 if group_size == -1 else in_features // group_size
        sizes = {
            "qweight": (in_features * bits // 32, out_features),
            "qzeros": (groups, out_features * bits // 32),
            "scales": (groups, out_features),
            "g_idx": (in_features,),
        }
        for name, size in sizes.items():
            self.register_buffer(name, torch.empty(size, dtype=torch.float16 if name == "scales" else torch.int32))

    def qzero_format(self, number: int) -> None:
        assert number == 2

    def post_init(self) -> None:
        self.dense = dense_weight(dict(self.named_buffers()), self.kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.dense.t().to(x.dtype)


class Rearranges(Keeps):
    """Keeps the words in another order."""

    def post_init(self) -> None:
        super().post_init()
        self.qweight = self.qweight.flip(0).contiguous()


class Midpoint(Keeps):
    """Takes the midpoint for every zero point."""

    def post_init(self) -> None:
        middle = torch.full_like(self.qzeros, -0x77777778)
        self.dense = dense_weight({**dict(self.named_buffers()), "qzeros": middle}, self.kind)


class Fails(Keeps):
    def post_init(self) -> None:
        raise RuntimeError("no compiler here\nand more")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts stand-ins in the place of gptqmodel's kernels."""

    def put(*kinds: type) -> None:
        monkeypatch.setattr(gptqmodel_product, "missing", lambda: None)
        monkeypatch.setattr(gptqmodel_product, "_kinds", lambda *_: iter([(kind, None) for kind in kinds]))

    return put


# -- choosing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("v1", [True, False])
def test_zero_points_are_given_as_the_kernel_wants_them(kernels: Any, bits: int, v1: bool) -> None:
    """Random zero points, 0 among them, which the first version stores as the largest of the field."""
    kernels(Keeps)
    module = module_of(Kind(bits=bits, v1=v1))
    expected = module(inputs(module))
    assert take_kernel(module, True) is None
    assert str(module.kernel) == "gptqmodel's Keeps"
    assert error(module(inputs(module)), expected) < TOLERANCE


def test_kernels_that_fail_or_multiply_something_else_are_passed_over(kernels: Any) -> None:
    kernels(Fails, Midpoint, Keeps)
    module = module_of(Kind())
    assert take_kernel(module, True) is None
    assert str(module.kernel) == "gptqmodel's Keeps"
    kernels(Fails, Midpoint)
    module = module_of(Kind())
    reason = take_kernel(module, True)
    assert reason is not None
    assert reason.startswith(
        "Fails: no compiler here and more; Midpoint: its product differs from that of the dequantized weight"
    )
    assert module.kernel is None
    assert module(inputs(module)).isfinite().all()


def test_zero_points_tell_whether_a_weight_is_symmetric(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(gptqmodel_product, "_kinds", lambda *given: asked.append(given[3]) or iter([(Keeps, None)]))
    module = module_of(Kind())
    take_kernel(module, True)
    middle = torch.full_like(module.components["qzeros"], 0x77777777)  # 8, less one
    module.take({"qzeros": middle})
    take_kernel(module, True)
    assert asked[1::2] == [False, True], "the first of each pair is the config's word, before weights are there"


def test_words_stay_where_the_kernel_left_them(kernels: Any) -> None:
    kernels(Keeps)
    module = module_of(Kind(act_order=True))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert take_kernel(module, True) is None
    assert module.kernel is not None
    for name in ("qweight", "scales", "g_idx"):
        assert getattr(module.kernel.linear, name).data_ptr() == module.components[name].data_ptr()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    x = inputs(module).requires_grad_()
    back = torch.randn(2, 3, module.out_features).bfloat16()
    module(x).backward(back)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, back @ module.dequantized())
    module.half()
    assert module.kernel is not None, "a cast moves nothing"
    module.to("meta")
    assert module.kernel is None


def test_words_that_must_stay_are_not_rearranged(kernels: Any) -> None:
    kernels(Rearranges)
    module = module_of(Kind())
    assert take_kernel(module, True) == "Rearranges: it rearranges the stored words"
    assert module.kernel is None
    assert module.given is None


def test_words_that_a_kernel_rearranged_are_not_used_again(kernels: Any) -> None:
    kernels(Rearranges)
    module = module_of(Kind())
    x = inputs(module)
    expected = module(x)
    assert take_kernel(module, False) is None
    assert error(module(x), expected) < TOLERANCE
    assert not list(module.buffers())
    told = r"m\.weight: gptqmodel's Rearranges has rearranged .* Load with forward='auto' or 'dequantize'"
    for use in (
        module.state_dict,
        module.dequantized,
        lambda: module.weight,
        lambda: module.to("meta"),
        lambda: module(x.clone().requires_grad_()).sum(),
    ):
        with pytest.raises(InputError, match=told):
            use()


@pytest.mark.parametrize(
    ("kind", "dtype", "dim", "told"),
    [
        (Kind(), "float32", None, "multiply in float16 or bfloat16, and the model is loaded as float32"),
        (Kind(act_order=True), "bfloat16", 1, "inputs are cut and in the order of their activations"),
        (Kind(group=48), "bfloat16", None, "128 inputs are no multiple of the group size 48"),
    ],
)
def test_weights_that_no_kernel_is_for(kernels: Any, kind: Kind, dtype: str, dim: int | None, told: str) -> None:
    kernels(Keeps)
    module = module_of(kind, dtype, dim)
    assert told in (take_kernel(module, True) or "")
    assert module.kernel is None


# -- models ------------------------------------------------------------------------------------------------------------


def loaded(path: str, forward: str, quant: Any = RTN, **more: Any) -> Any:
    return dq.load(path, quantization_config=quant, forward=forward, **{"dtype": "bfloat16", **more})


@pytest.mark.parametrize("kernel", [Keeps, Rearranges])
def test_a_model_multiplies_and_has_its_fingerprint(kernels: Any, kjv_tiny: str, kernel: type) -> None:
    kernels(kernel)
    exact, fast = loaded(kjv_tiny, "dequantize"), loaded(kjv_tiny, "gptqmodel")
    number = len(exact.distquant.plan.converted)
    assert exact.distquant.report.forward == f"dequantized and multiplied: {number} modules"
    assert fast.distquant.report.forward == f"gptqmodel's {kernel.__name__}: {number} modules"
    with torch.no_grad():
        assert error(fast(IDS).logits, exact(IDS).logits) < 0.02
    assert fast.generate(IDS, max_new_tokens=2).shape[1] > IDS.shape[1]
    assert dq.fingerprint(fast) == dq.fingerprint(exact)


def test_a_model_whose_words_are_rearranged_is_not_saved(kernels: Any, kjv_tiny: str, tmp_path: Any) -> None:
    kernels(Rearranges)
    model = loaded(kjv_tiny, "gptqmodel")
    with pytest.raises(InputError, match="has rearranged the stored words for itself: they cannot be read, saved"):
        model.save_pretrained(tmp_path)
    kernels(Keeps)
    loaded(kjv_tiny, "gptqmodel").save_pretrained(tmp_path)
    assert dq.fingerprint(dq.load(str(tmp_path), dtype="bfloat16")) == dq.fingerprint(loaded(kjv_tiny, "dequantize"))


def test_adapters_train_on_words_that_stay(kernels: Any, kjv_tiny: str) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False)
    kernels(Keeps)
    tuned = get_peft_model(loaded(kjv_tiny, "gptqmodel"), config)
    tuned(IDS, labels=IDS).loss.backward()
    gradients = [value.grad for name, value in tuned.named_parameters() if "lora_" in name]
    assert gradients
    assert all(value is not None and value.abs().sum() > 0 for value in gradients)
    kernels(Rearranges)
    with pytest.raises(InputError, match="cannot be read, saved or trained on"):
        get_peft_model(loaded(kjv_tiny, "gptqmodel"), config)


def test_a_cpu_dequantizes_by_itself(kernels: Any, kjv_tiny: str) -> None:
    kernels(Keeps)
    assert loaded(kjv_tiny, "auto").distquant.report.forward.startswith("dequantized and multiplied: ")


def test_a_gpu_takes_kernels_that_leave_the_words(kernels: Any) -> None:
    """Where the weights lie is all that is asked; here they lie on the CPU."""
    from distquant.assemble.forward import _without_kernel

    gpu = torch.device("cuda", 0)
    for kernel, forward, told in (
        (Keeps, Forward.AUTO, ""),
        (Rearranges, Forward.AUTO, "Rearranges: it rearranges the stored words"),
        (Rearranges, Forward.GPTQMODEL, ""),
        (Keeps, Forward.DEQUANTIZE, ""),
        (Keeps, Forward.FLOAT8, ""),
    ):
        kernels(kernel)
        module = module_of(Kind())
        assert _without_kernel(module, forward, gpu) == told
        assert (module.kernel is None) == (bool(told) or forward in (Forward.DEQUANTIZE, Forward.FLOAT8))


def test_a_kernel_that_fails_when_asked_for_is_an_error(kernels: Any, kjv_tiny: str) -> None:
    kernels(Fails)
    with pytest.raises(InputError, match=r"gptqmodel has no kernel for model\..*: Fails: no compiler here and more\."):
        loaded(kjv_tiny, "gptqmodel")


@pytest.mark.parametrize(
    ("quant", "more", "told"),
    [
        ("nf4", {}, "'gptqmodel' is for weights that are kept in the layouts of GPTQ and AWQ; bitsandbytes_4bit as"),
        (None, {}, "'gptqmodel' is for weights that are kept in the layouts of GPTQ and AWQ; none as it is"),
        (RTN, {"dtype": "float32"}, r"no kernel for model\..* \(\d+ weights\): gptqmodel's kernels multiply in"),
        (RTN, {"device_map": {"model": "cpu", "lm_head": "disk"}}, "cannot be with a device map that offloads"),
    ],
)
def test_refused_before_weights_move(kernels: Any, kjv_tiny: str, quant: Any, more: Any, told: str) -> None:
    kernels(Keeps)
    with pytest.raises(InputError, match=f"forward: .*{told}") as caught:
        loaded(kjv_tiny, "gptqmodel", quant, **more)
    assert "Take 'auto' or 'dequantize'" in str(caught.value)


@pytest.mark.parametrize(
    ("have", "told"),
    [("7.5.0", r"gptqmodel 7\.5\.0, 7\.6\.0 or newer is needed"), (None, "gptqmodel is not installed")],
)
def test_refused_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, kjv_tiny: str, have: str | None, told: str
) -> None:
    versions = importlib.metadata.version

    def version(name: str) -> str:
        if name != "gptqmodel":
            return versions(name)
        if have is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return have

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(gptqmodel_product, "missing", missing.__wrapped__)
    with pytest.raises(InputError, match=f"forward: 'gptqmodel' cannot be: {told}"):
        loaded(kjv_tiny, "gptqmodel")
    assert loaded(kjv_tiny, "auto").distquant.report.forward.startswith("dequantized and multiplied: ")


# -- gptqmodel itself --------------------------------------------------------------------------------------------------


@pytest.fixture
def installed() -> Iterator[None]:
    """gptqmodel, or a visible skip; without torch's compiler, which its plain kernel would take seconds of."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with torch.compiler.set_stance("force_eager"):
        yield


ATEN = [
    Kind(),
    Kind(v1=False),
    Kind(act_order=True),
    Kind(method="awq"),
    Kind(method="auto-round", packing="auto_round:auto_gptq"),
    Kind(method="auto-round", packing="auto_round:auto_awq"),
]
PLAIN = [Kind(bits=bits, v1=v1) for bits in (2, 3, 8) for v1 in (True, False)]
PLAIN += [Kind(group=-1), Kind(bits=8, act_order=True)]


@pytest.mark.parametrize("kind", [*ATEN, *PLAIN], ids=str)
@pytest.mark.parametrize("part", [(None, 0), (0, 1), (1, 0), (1, 1)], ids=["whole", "rows", "left", "right"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_its_product_is_ours(installed: None, kind: Kind, part: tuple[int | None, int], dtype: str) -> None:
    module = module_of(kind, dtype, *part)
    x = inputs(module)
    expected = module(x)
    reason = take_kernel(module, False)
    if kind.act_order and part[0] == 1:
        assert reason == "inputs are cut and in the order of their activations, so that groups are in parts"
        return
    assert reason is None
    aten = "TorchAtenAwqLinear" if kind.awq else "TorchAtenLinear"
    assert str(module.kernel) == f"gptqmodel's {aten if kind in ATEN else 'TorchLinear'}"
    assert (module.given is not None) == (kind in ATEN)
    assert error(module(x), expected) < TOLERANCE


@pytest.mark.parametrize("kind", [Kind(bits=8), Kind(bits=3), Kind(bits=8, group=-1)], ids=str)
def test_zero_points_less_one_are_not_mistaken(installed: None, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be told if the first version's words were given as they are."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    monkeypatch.setattr(TorchLinear, "REQUIRES_FORMAT_V2", False)
    assert (take_kernel(module_of(kind), False) or "").startswith("TorchLinear: its product differs from that of")


def test_its_kernels_on_a_cpu_rearrange_words(installed: None) -> None:
    assert take_kernel(module_of(Kind()), True) == "TorchAtenLinear: it rearranges the stored words"
    assert "none of its kernels" in (
        why_not(scheme_of(Kind(bits=8)), Shard("m.weight", SHAPE, "float16"), CPU, True) or ""
    )


@pytest.mark.parametrize("quant", [RTN, {"quant_method": "awq", "bits": 4, "group_size": 32}])
def test_a_model_multiplied_by_it(installed: None, kjv_tiny: str, quant: Any, capsys: Any) -> None:
    exact = loaded(kjv_tiny, "dequantize", quant)
    capsys.readouterr()
    fast = loaded(kjv_tiny, "gptqmodel", quant)
    assert not capsys.readouterr().out, "standard output is for what was asked for"
    name = "TorchAtenLinear" if quant is RTN else "TorchAtenAwqLinear"
    assert fast.distquant.report.forward == f"gptqmodel's {name}: {len(exact.distquant.plan.converted)} modules"
    with torch.no_grad():
        assert error(fast(IDS).logits, exact(IDS).logits) < 0.02
    assert dq.fingerprint(fast) == dq.fingerprint(exact)
    with pytest.raises(InputError, match="has rearranged the stored words"):
        fast.state_dict()


def test_what_it_refuses_is_told_before_weights_move(installed: None, model_of: Any) -> None:
    quant = {"quant_method": "gptq", "bits": 4, "group_size": 24}
    with pytest.raises(InputError, match=r"forward: 'gptqmodel' has no kernel for .*: .*only supports"):
        loaded(model_of("llama-gqa"), "gptqmodel", quant)
