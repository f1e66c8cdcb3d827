"""Methods that transformers loads with its own quantizers: configured and checked here, never cut.

Their kernels or formats belong to other libraries, so a model of theirs goes to one device, or over several by device
map, and only where its library is installed. Nothing of it streams through distquant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from distquant import config as configs
from distquant.config import QuantizationConfig
from distquant.errors import Problem
from distquant.layout import Layout, plain
from distquant.schemes.base import Context, Scheme
from distquant.schemes.registry import register
from distquant.schemes.shard import Shard
from distquant.skeleton.words import Skeleton

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distquant.tally import Tally


class DelegatedScheme(Scheme):
    """Converts no module: `transformers.from_pretrained` does, see `assemble.delegated`."""

    delegated = True
    needs: ClassVar[str] = ""
    """What it needs besides packages, for people."""
    stored_only: ClassVar[bool] = False
    """Whether transformers only loads checkpoints of it, and never quantizes."""
    on_the_fly_only: ClassVar[bool] = False
    """Whether transformers only quantizes, and never loads a checkpoint of it."""

    def validate(self, context: Context) -> list[Problem]:
        found = super().validate(context)
        method = self.config.quant_method
        if context.mesh.size > 1:
            what = f"{context.mesh}, and weights of {method!r} are loaded by transformers, which cannot cut them"
            found.append(Problem("mesh", what, "Use one rank, or device_map='auto' over the devices of one process"))
        if self.stored_only and not context.prequantized:
            what = f"{method!r} cannot quantize on the way, and this checkpoint is not quantized with it"
            found.append(Problem("quantization_config", what, "Take a checkpoint of that method, or another method"))
        if self.on_the_fly_only and context.prequantized:
            what = f"transformers reads no checkpoint that is stored as {method!r}"
            found.append(Problem("quantization_config", what, "Load the unquantized checkpoint"))
        if self.needs and context.facts.device_type == "cpu":
            found.append(Problem("environment", f"{method!r} needs {self.needs}, this is a CPU", "Use such a device"))
        return found

    def converts(self, skeleton: Skeleton) -> list[str]:
        return []

    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        return plain(dtype, len(shape))

    def module(self, linear: nn.Module, shard: Shard) -> nn.Module:
        raise AssertionError(_BY_TRANSFORMERS)

    def encode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Any) -> None:
        raise AssertionError(_BY_TRANSFORMERS)

    def complete(self, shard: Shard, module: nn.Module, parts: dict[str, Tensor], ops: Any) -> None:
        raise AssertionError(_BY_TRANSFORMERS)

    def dequantized(self, module: nn.Module, shard: Shard, ops: Any) -> Tensor:
        raise AssertionError(_BY_TRANSFORMERS)

    def tally(self, module: nn.Module, shard: Shard, tally: Tally) -> None:
        raise AssertionError(_BY_TRANSFORMERS)


_BY_TRANSFORMERS = "a delegated method converts no module of distquant's"


def _delegate(
    config: type[QuantizationConfig],
    packages: Mapping[str, str] | None = None,
    capability: tuple[int, int] | None = None,
    needs: str = "",
    **more: bool,
) -> None:
    """Registers a method; packages and devices are what `validate_environment` of its quantizer asks for (5.23)."""
    members = {
        "name": config.quant_method,
        "config_class": config,
        "requires": dict(packages or {}),
        "min_capability": capability,
        "needs": needs,
        "__doc__": config.__doc__,
        **more,
    }
    register(type(f"{config.__name__.removesuffix('Config')}Scheme", (DelegatedScheme,), members))


GPU = "a CUDA or XPU device"

_delegate(configs.Mxfp4Config)
_delegate(configs.Nvfp4Config, {"kernels": "0.10"}, (10, 0), "a CUDA device", on_the_fly_only=True)
_delegate(configs.EetqConfig, {"kernels": "0.10"}, None, "a CUDA device")
_delegate(configs.BitnetConfig)
_delegate(configs.AqlmConfig, {"aqlm": "1.0"}, stored_only=True)
_delegate(configs.VptqConfig, {"vptq": "0.0.4"}, None, "a CUDA device", stored_only=True)
_delegate(configs.SpqrConfig, {"spqr_quant": "0.1"}, None, "a CUDA device", stored_only=True)
_delegate(configs.HiggsConfig, {"flute-kernel": "0.3", "fast_hadamard_transform": "1.0"}, None, "a CUDA device")
_delegate(configs.FpQuantConfig, {"fp_quant": "0.3"}, None, GPU)
_delegate(configs.FourOverSixConfig, {"fouroversix": "0.1"}, None, "a CUDA device")
_delegate(configs.QuarkConfig, {"amd-quark": "0.8"}, stored_only=True)
_delegate(configs.SinqConfig, {"sinq": "0.1"})
_delegate(configs.MetalConfig, {"kernels": "0.10"}, None, "an Apple device")
_delegate(configs.GemmaConfig)
