"""Answers in text: a prompt or a conversation becomes tokens, and new tokens become text, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from distquant.errors import InputError
from distquant.runtime.tokens import (
    Messages,
    check_vocabulary,
    encoded,
    template_inputs,
    tokenizer_of,
    vocabulary_of,
)

ANSWER_TOKENS = 512
"""Tokens of an answer in a conversation, at most, where neither the caller nor the model's generation config says."""


class End(str, Enum):
    """Reasons for which an answer ends."""

    MODEL = "model"
    """The model has ended it."""
    LENGTH = "length"
    """It has as many new tokens as were asked for."""
    CONTEXT = "context"
    """Conversation and answer fill the model's context."""
    STOPPED = "stopped"
    """The caller, a stop string, or another criterion has ended it."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer of a model."""

    text: str
    """The new text, without the prompt."""
    tokens: int
    """New tokens."""
    end: str
    """A value of `End`."""


def generate(model: Any, prompt: str | Sequence[str] | Messages, **kwargs: Any) -> str | list[str]:
    """Returns prompt and continuation as text, or the answer in a conversation. On a sharded model all ranks call it.

    Args:
        model: the loaded model.
        prompt: one prompt; a list of prompts that are answered as a batch; or messages, dicts with `role` and
            `content`, which the model's chat template turns into a prompt.
        kwargs: of `generate` of transformers.

    Returns:
        All answers in order where several were asked for (prompts, or `num_return_sequences`); else the only one.

    Raises:
        InputError: `return_dict_in_generate`, which asks for more than text; or messages that the model cannot take.
    """
    _check(prompt, kwargs)
    tokenizer = tokenizer_of(model)
    inputs, kwargs, start = _prepared(model, tokenizer, prompt, kwargs)
    output = model.generate(**inputs, **kwargs)
    answers = tokenizer.batch_decode(output[:, start:], skip_special_tokens=True)
    several = len(answers) > 1 or not (isinstance(prompt, str) or start)
    return answers if several else answers[0]


def answer(
    model: Any,
    prompt: str | Messages,
    on_text: Callable[[str], None] | None = None,
    stopped: Callable[[], bool] | None = None,
    **kwargs: Any,
) -> Answer:
    """Returns the answer to one prompt or conversation, and hands over its text as it comes.

    On a sharded model all ranks call it; `on_text` and `stopped` may be given to one rank only.

    Args:
        model: the loaded model.
        prompt: a prompt, or messages (see `generate`).
        on_text: called with each piece of new text. Joined, the pieces are the answer's text.
        stopped: asked after each token; True ends the answer.
        kwargs: of `generate` of transformers.

    Raises:
        InputError: messages that the model cannot take, or options that give more than one text.
    """
    _check(prompt, kwargs)
    if not isinstance(prompt, str) and not is_messages(prompt):
        raise InputError.one("prompt", "one answer comes in pieces, not a batch", "Give one prompt, or messages")
    for option in ("num_return_sequences", "num_beams"):
        if (kwargs.get(option) or 1) > 1:
            raise InputError.one(option, "pieces come of one sequence", "Leave it out, or use generate")
    tokenizer = tokenizer_of(model)
    inputs, given, start = _prepared(model, tokenizer, prompt, kwargs)
    context = inputs["input_ids"][0].tolist()
    pieces = TextPieces(tokenizer, [] if start else context, on_text)
    given = {**given, "streamer": pieces}
    if stopped is not None:
        given["stopping_criteria"] = [*given.get("stopping_criteria", ()), _criterion(stopped)]
    output = model.generate(**inputs, **given)
    new = output[0, len(context) :].tolist()
    return Answer(text=pieces.text, tokens=len(new), end=_end(model, new, len(context), given).value)


class TextPieces:
    """A streamer of transformers that decodes tokens to text as they come, and holds back incomplete characters.

    Each new token is decoded together with those before it, because tokenizers join and separate them.
    """

    def __init__(self, tokenizer: Any, context: list[int], on_text: Callable[[str], None] | None = None):
        """Begins the text that follows the tokens of `context`."""
        self.tokenizer, self.on_text, self.text = tokenizer, on_text, ""
        self._tokens, self._done = list(context), len(context)
        self._from = max(len(context) - _OVERLAP, 0)
        self._prompt = True

    def put(self, tokens: Any) -> None:
        """Takes the prompt first, `[1, length]`, and then one or more new tokens."""
        if self._prompt:
            self._prompt = False
            return
        self._tokens += tokens.flatten().tolist()
        self._show(final=False)

    def end(self) -> None:
        """Hands over what was held back."""
        self._show(final=True)

    def _show(self, final: bool) -> None:
        before = self._decode(self._tokens[self._from : self._done])
        after = self._decode(self._tokens[self._from :])
        if len(after) <= len(before) or (after.endswith(_INCOMPLETE) and not final):
            return
        piece = after[len(before) :]
        self._from, self._done = self._done, len(self._tokens)
        self.text += piece
        if self.on_text is not None:
            self.on_text(piece)

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


_INCOMPLETE = "\ufffd"
"""Decoded in place of a character of which only some bytes are there."""

_OVERLAP = 8
"""Tokens of a prompt that the first new one is decoded with."""


def is_messages(prompt: Any) -> bool:
    """Returns True for messages rather than prompts."""
    return not isinstance(prompt, str) and len(prompt) > 0 and all(isinstance(each, Mapping) for each in prompt)


def context_length(model: Any) -> int | None:
    """Returns the tokens that the model was made for, prompt and answer together; None if its config does not say."""
    length = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def _prepared(model: Any, tokenizer: Any, prompt: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any], int]:
    """Returns inputs and options of `generate`, and the tokens of its output that are not part of the answer."""
    if (kwargs.get("generation_config") or model.generation_config).stop_strings or kwargs.get("stop_strings"):
        kwargs = {"tokenizer": tokenizer, **kwargs}
    if not is_messages(prompt):
        batch: dict[str, Any] = {} if isinstance(prompt, str) else {"padding": True, "padding_side": "left"}
        inputs = encoded(tokenizer, prompt, return_tensors="pt", **batch)
        check_vocabulary(inputs["input_ids"], vocabulary_of(model))
        return inputs.to(model.device), kwargs, 0
    inputs = template_inputs(tokenizer, prompt)
    check_vocabulary(inputs["input_ids"], vocabulary_of(model), "messages")
    inputs = inputs.to(model.device)
    length = inputs["input_ids"].shape[1]
    room = _room(model, length)
    if (wanted := _wanted(model, kwargs)) is not None:
        kwargs = {**kwargs, "max_new_tokens": wanted if room is None else min(wanted, room)}
    return inputs, kwargs, length


def _room(model: Any, length: int) -> int | None:
    """Returns the new tokens that a conversation of this length leaves room for; None if there is no limit.

    Raises:
        InputError: there is room for none.
    """
    limit = context_length(model)
    if limit is not None and length >= limit:
        fault = f"the conversation has {length} tokens, and the model's context ends at {limit}"
        raise InputError.one("context", fault, "Begin a new conversation, or leave out earlier messages")
    return None if limit is None else limit - length


def _wanted(model: Any, kwargs: dict[str, Any]) -> int | None:
    """Returns the new tokens that an answer may have; None if its whole length is limited instead."""
    config = kwargs.get("generation_config") or model.generation_config
    if kwargs.get("max_new_tokens") is not None:
        return kwargs["max_new_tokens"]
    if kwargs.get("max_length") is not None:
        return None
    return config.max_new_tokens or ANSWER_TOKENS


def _end(model: Any, new: list[int], length: int, given: dict[str, Any]) -> End:
    """Returns why an answer of these new tokens has ended; the prompt has `length` tokens."""
    ends = given.get("eos_token_id", (given.get("generation_config") or model.generation_config).eos_token_id)
    if new and new[-1] in (ends if isinstance(ends, list) else [ends]):
        return End.MODEL
    if context_length(model) == length + len(new):
        return End.CONTEXT
    return End.LENGTH if len(new) == given.get("max_new_tokens") else End.STOPPED


def _check(prompt: Any, kwargs: dict[str, Any]) -> None:
    if not isinstance(prompt, str) and not len(prompt):
        raise InputError.one("prompt", "an empty list", "Give a prompt, or messages")
    if kwargs.get("return_dict_in_generate"):
        fix = "Use call(function), where the function calls model.generate and returns what it needs"
        raise InputError.one("return_dict_in_generate", "the answer of generate is text", fix)


def _criterion(stopped: Callable[[], bool]) -> Callable[..., Any]:
    """Returns a stopping criterion of transformers: `[rows]`, True for all once `stopped()` is True."""
    import torch

    def criterion(input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), stopped(), device=input_ids.device, dtype=torch.bool)

    return criterion
