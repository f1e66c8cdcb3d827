"""Products by the kernels that gptqmodel has for a CPU; skipped where it is missing.

`make test` does not install it, because version 7.6.0 wants another numpy than the rest is tested with; by hand: `pip
install --no-deps gptqmodel==7.6.0`, then `pip install -c constraints.txt torch device-smi pypcre tokenicer logbar
defuser datasets threadpoolctl protobuf pillow ninja`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gptq_modules import CPU, IDS, RTN, SHAPE, error, inputs, loaded, module_of, scheme_of
from packed_words import Kind

import distquant as dq
from distquant.errors import InputError
from distquant.quantization import Shard
from distquant.quantization.linear.gptqmodel_matmul import TOLERANCE, missing, take_kernel, why_not


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
        assert reason == "inputs are split and in the order of their activations, so that groups are in parts"
        return
    assert reason is None
    aten = "TorchAtenAwqLinear" if kind.awq else "TorchAtenLinear"
    assert str(module.kernel) == f"gptqmodel's {aten if kind in ATEN else 'TorchLinear'}"
    assert (module.counted is not None) == (kind in ATEN)
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
