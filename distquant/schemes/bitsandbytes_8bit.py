"""LLM.int8: int8 rows with one float32 absmax each; the weight passes through float16 first.

A row's absmax reaches over `in`, so rows are quantized whole, by whichever rank reads them, and a shard that is cut
along `in` keeps the absmax of every row. Weights are then exact. Activations are quantized per local row in forward,
so logits of such a shard differ by the method's own error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from distquant.config import Bnb8bitConfig, torch_dtype
from distquant.errors import InputError, Problem
from distquant.layout import ALL, PLAIN_STEPS, Component, Layout
from distquant.schemes.bitsandbytes import BitsandbytesScheme
from distquant.schemes.registry import register
from distquant.schemes.shard import Shard
from distquant.tally import WHOLE_ROW

if TYPE_CHECKING:
    from distquant.tally import Tally

ROW_FORMAT = 0
"""The only weight format that bitsandbytes still writes: row-major."""


@register
class Bnb8bitScheme(BitsandbytesScheme):
    """`bnb.nn.Linear8bitLt` of local size."""

    name = "bitsandbytes_8bit"
    config_class = Bnb8bitConfig
    suffixes: ClassVar[Mapping[str, str]] = {"SCB": "SCB", "weight_format": "weight_format"}
    mark = "is_loaded_in_8bit"
    config: Bnb8bitConfig

    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        codes = Component(name="", dtype="int8", cuts=PLAIN_STEPS)
        return Layout((codes, Component(name="SCB", dtype="float32", spans=(1, ALL), cuts=PLAIN_STEPS)))

    def check_weight(self, name: str, shape: tuple[int, ...]) -> list[Problem]:
        return []

    def check_stored(self, name: str, shape: tuple[int, ...], stored: dict[str, tuple[int, ...]]) -> list[Problem]:
        missing = [component or "weight" for component in ("", "SCB") if component not in stored]
        if missing:
            what = f"the checkpoint lacks {', '.join(missing)} of this quantized weight"
            return [Problem(name, what, "Download the checkpoint again, or quantize the original")]
        if stored["SCB"] != shape[:1] or stored[""] != shape:
            what = f"int8 {list(stored[''])} with SCB {list(stored['SCB'])}, the model has {list(shape)}"
            return [Problem(name, what, "The checkpoint is of another model; check config.json")]
        return []

    # -- executing -------------------------------------------------------------------------------------------------

    def module(self, linear: nn.Module, shard: Shard) -> nn.Module:
        import bitsandbytes as bnb

        out_features, in_features = shard.local_shape
        return bnb.nn.Linear8bitLt(
            in_features,
            out_features,
            bias=linear.bias is not None,
            has_fp16_weights=False,
            threshold=self.config.llm_int8_threshold,
            device="meta",
        )

    def encode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Any) -> None:
        ops.quantize_int8_rows(rows, codes=out[""].view(rows.shape), absmax=out["SCB"])

    def complete(self, shard: Shard, module: nn.Module, parts: dict[str, Tensor], ops: Any) -> None:
        self.fill(module, parts[""].view(shard.local_shape), parts["SCB"])

    def restore(self, shard: Shard, module: nn.Module, parts: dict[str, Tensor], whole: frozenset[str]) -> None:
        found = int(parts["weight_format"].item()) if "weight_format" in parts else ROW_FORMAT
        if found != ROW_FORMAT:
            what = f"its weight_format is {found}, only {ROW_FORMAT} (row) is supported"
            raise InputError.one(shard.name, what, "Quantize the original again with a current bitsandbytes")
        self.fill(module, parts[""].view(shard.local_shape), parts["SCB"])

    def fill(self, module: nn.Module, codes: Tensor, absmax: Tensor) -> None:
        """Puts codes (int8 `[out, in]`) and row absmax (float32 `[out]`) into a `Linear8bitLt`."""
        from bitsandbytes.nn import Int8Params

        module.weight = Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=absmax)

    def dequantized(self, module: nn.Module, shard: Shard, ops: Any) -> Tensor:
        weight: Any = module.weight
        return (weight.data.float() * (weight.SCB.float() / 127).view(-1, 1)).to(torch_dtype(shard.dtype))

    def tally(self, module: nn.Module, shard: Shard, tally: Tally) -> None:
        weight: Any = module.weight
        state: Any = module.state
        absmax = weight.SCB if weight.SCB is not None else state.SCB
        tally.shard("code", weight.data, shard.shape, shard.dim, shard.owned)
        tally.shard("scale", absmax.view(-1, 1), shard.shape, shard.dim, shard.owned, span=WHOLE_ROW)
