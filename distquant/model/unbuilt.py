"""Reasons why transformers does not build a causal language model of a checkpoint, in words that help."""

from __future__ import annotations

from typing import Any

from distquant.errors import one_line

UNKNOWN = "AutoModelForCausalLM of transformers must be able to build it; check config.json and generation_config.json"

CLASSES = {
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": ("a multimodal model", "AutoModelForImageTextToText"),
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": ("a multimodal model", "AutoModelForMultimodalLM"),
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": ("an encoder and a decoder", "AutoModelForSeq2SeqLM"),
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": ("a speech model", "AutoModelForSpeechSeq2Seq"),
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": ("a masked language model", "AutoModelForMaskedLM"),
    "MODEL_MAPPING_NAMES": ("no causal language model", "AutoModel"),
}
"""Mapping of transformers by `model_type` -> what its models are, and the class that builds them; the first counts."""


def why_not_built(error: Exception, config: Any, trusted: bool) -> tuple[str, str]:
    """Returns a fault and advice.

    Args:
        error: of transformers.
        config: the model's, if that could be read.
        trusted: True if the checkpoint's code was allowed to run.
    """
    if "trust_remote_code" in str(error) and not trusted:
        fix = "Read the model's code, then pass trust_remote_code=True (--trust-remote-code) if you trust it"
        return one_line(error), fix
    return _other_kind(config) or (one_line(error), UNKNOWN)


def _other_kind(config: Any) -> tuple[str, str] | None:
    """Returns a fault and advice for a model of another kind; None for any that this is not the reason of."""
    from transformers.models.auto import modeling_auto

    kind = getattr(config, "model_type", None)
    if kind is None or kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    for mapping, (described, builder) in CLASSES.items():
        known = getattr(modeling_auto, mapping, {})
        if kind not in known or not hasattr(modeling_auto, builder):
            continue
        names = known[kind]
        name = names if isinstance(names, str) else names[0]
        fault = f"{name} ({kind}) is {described}, which AutoModelForCausalLM of transformers does not build"
        text = getattr(getattr(config, "text_config", None), "model_type", None)
        if text in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            way = f"Give a checkpoint of its text model alone (model_type {text!r}), or load it with {builder}"
            return fault, f"{way} of transformers; distquant does not load it whole yet"
        return fault, f"Load it with {builder} of transformers; distquant loads causal language models"
    return None
