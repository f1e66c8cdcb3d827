"""Methods that transformers loads with its own quantizers: configured and checked here, never partitioned.

Their kernels or formats belong to other libraries, so a model of theirs goes to one device, or over several by device
map, and only where its library is installed. distquant streams none of its weights, so these methods have layout rules
alone, and none needs a file of its own.
"""

from __future__ import annotations

from packaging.version import Version

from distquant import config as configs
from distquant.config import QuantizationConfig
from distquant.config.requirements import REQUIREMENTS
from distquant.errors import Problem
from distquant.model.description import ModelDescription
from distquant.quantization.registry import register
from distquant.quantization.scheme import Context, Scheme
from distquant.sharding.layout import Layout, plain


class DelegatedScheme(Scheme):
    """Converts no module: transformers does, in `from_pretrained` (see `loading.delegated`)."""

    delegated = True

    def validate(self, context: Context) -> list[Problem]:
        """Lists what transformers would not load, and what is not supported here: more than one rank."""
        method, environment = self.config.quant_method, context.environment
        needs = REQUIREMENTS[method]
        problems = [] if self.config.dequantize else super().validate(context)
        for package, limit in needs.below.items():
            have = environment.packages.get(package)
            if have is not None and Version(have) >= Version(limit):
                fault = f"{package} {have}, {method!r} needs one below {limit}"
                problems.append(Problem("environment", fault, f"Run: pip install '{package}<{limit}'"))
        if environment.device_type == "cpu" and not needs.cpu and not self.config.dequantize:
            note = f" ({needs.note})" if needs.note else ""
            problems.append(Problem("environment", f"{method!r} does not run on a CPU{note}", "Use a GPU"))
        if context.mesh.size > 1:
            fault = f"{context.mesh}, and weights of {method!r} are loaded by transformers, which cannot partition them"
            problems.append(
                Problem("mesh", fault, "Use one rank, or device_map='auto' over the devices of one process")
            )
        if not needs.quantizes and not context.prequantized:
            fault = f"{method!r} cannot quantize while loading, and this checkpoint is not quantized with it"
            problems.append(
                Problem("quantization_config", fault, "Take a checkpoint of that method, or another method")
            )
        return problems

    @classmethod
    def quantizes(cls) -> bool:
        return REQUIREMENTS[cls.config_class.quant_method].quantizes

    @classmethod
    def reads_stored(cls) -> bool:
        return cls.config_class is not configs.Nvfp4Config  # transformers refuses them

    def select_modules(self, description: ModelDescription) -> list[str]:
        return []

    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        return plain(dtype, len(shape))


def _delegate(config: type[QuantizationConfig]) -> None:
    """Registers the scheme of one method."""
    needs = REQUIREMENTS[config.quant_method]
    members = {
        "name": config.quant_method,
        "config_class": config,
        "requires": needs.packages,
        "min_capability": needs.capability,
        "__doc__": config.__doc__,
    }
    register(type(config.__name__.removesuffix("Config") + "Scheme", (DelegatedScheme,), members))


for _config in (
    configs.Nvfp4Config,
    configs.EetqConfig,
    configs.BitnetConfig,
    configs.AqlmConfig,
    configs.VptqConfig,
    configs.SpqrConfig,
    configs.HiggsConfig,
    configs.FpQuantConfig,
    configs.FouroversixConfig,
    configs.QuarkConfig,
    configs.SinqConfig,
    configs.MetalConfig,
    configs.GemmaConfig,
):
    _delegate(_config)
