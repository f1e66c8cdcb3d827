"""Text to tokens: a model's tokenizer and its chat template. Both are files of the checkpoint, which may be wrong.

What a library raises for them becomes an `InputError` here. The package tokenizers raises plain `Exception`, and in a
panic of its Rust code an exception that is none, so that nothing narrower could be caught around its calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distquant.errors import InputError, one_line
from distquant.model import source_of, tokenizer_file_problems

Messages = Sequence[Mapping[str, Any]]
"""A conversation: dicts with `role` (`system`, `user` or `assistant`) and `content`."""


@contextmanager
def tokenizer_call(where: str, fault: str, fix: str) -> Iterator[None]:
    """Turns whatever a call of the tokenizer raises into an `InputError`. Holds such a call alone, no code of ours."""
    try:
        yield
    except Exception as error:
        raise InputError.one(where, f"{fault} ({one_line(error)})", fix) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of pyo3; KeyboardInterrupt and others pass
            raise
        raise InputError.one(where, f"{fault} ({one_line(error)})", fix) from error


def tokenizer_of(model: Any) -> Any:
    """Returns the tokenizer of a loaded model, with a token for padding; it is read once.

    Raises:
        InputError: one of its files cannot be read.
    """
    loaded = model.distquant
    if loaded.tokenizer is None:
        plan = loaded.plan
        loaded.tokenizer = read_tokenizer(plan.model, plan.trust_remote_code)
    return loaded.tokenizer


def read_tokenizer(path: str | Path, trust_remote_code: bool, where: str = "tokenizer") -> Any:
    """Returns the tokenizer of a checkpoint, with a token for padding.

    Raises:
        InputError: a file cannot be read, or transformers cannot make a tokenizer of them.
    """
    from transformers import AutoTokenizer

    if problems := list(tokenizer_file_problems(Path(path))):
        raise InputError(problems)
    folder, gguf = source_of(path)
    with tokenizer_call(
        where, f"transformers cannot load a tokenizer from {path}", "Put the model's tokenizer.json there"
    ):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **gguf)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # the attention mask hides every padding
    return tokenizer


def encoded(tokenizer: Any, text: str | Sequence[str], where: str = "prompt", **options: Any) -> Any:
    """Returns what the tokenizer makes of a text, or of several; `options` are its own.

    Raises:
        InputError: the text is none, or the tokenizer fails.
    """
    for each in [text] if isinstance(text, str) else text:
        if isinstance(each, str):
            _check_text(each, where)
    with tokenizer_call(
        where, "the model's tokenizer cannot read it", "Check the text, and the model's tokenizer.json"
    ):
        return tokenizer(text, **options)


def _check_text(text: str, where: str) -> None:
    """Raises `InputError` for a text with halves of characters: bytes of a command line that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        fault = f"character {error.start} is {text[error.start]!r}, a lone surrogate, which is not text"
        raise InputError.one(where, fault, "Give text in UTF-8") from error


def check_vocabulary(ids: Any, vocabulary: int | None, where: str = "prompt") -> None:
    """Raises `InputError` if the model has no embedding for a token.

    Args:
        ids: numbers of tokens, a list or an integer tensor of any shape.
        vocabulary: entries of the model's vocabulary; None if it is not known.
        where: what the tokens are of.
    """
    numbers = ids.flatten().tolist() if hasattr(ids, "flatten") else ids
    if vocabulary is None or not numbers or max(numbers) < vocabulary:
        return
    fault = f"has the token {max(numbers)}, and the model's vocabulary has {vocabulary} entries"
    raise InputError.one(where, fault, "Give the model the tokenizer that belongs to it")


def vocabulary_of(model: Any) -> int | None:
    """Returns the entries of a loaded model's vocabulary; None if its configuration does not say."""
    size = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    return size if type(size) is int else None


def stored_vocabulary(config: Mapping[str, Any]) -> int | None:
    """Returns the entries of the vocabulary that a config.json names; None if it does not."""
    text = config.get("text_config")
    sizes = (part.get("vocab_size") for part in (config, text) if isinstance(part, Mapping))
    return next((size for size in sizes if type(size) is int), None)


def has_template(tokenizer: Any) -> bool:
    """Returns True if the model's tokenizer has a chat template."""
    return getattr(tokenizer, "chat_template", None) is not None


def template_inputs(tokenizer: Any, messages: Messages) -> Any:
    """Returns the input of `generate` for a conversation: tokens `[1, length]` that end where the answer begins.

    Raises:
        InputError: the messages have another form, or the template does not take them, or there is none.
    """
    for number, message in enumerate(messages):
        if missing := [key for key in ("role", "content") if key not in message]:
            fix = "Write messages as [{'role': 'user', 'content': 'Hello'}]"
            raise InputError.one(f"messages[{number}]", f"has no {' and no '.join(missing)}", fix)
        if isinstance(message["content"], str):
            _check_text(message["content"], f"messages[{number}]")
    if not has_template(tokenizer):
        fault = "the model has no chat template: it continues text, and knows no messages"
        raise InputError.one("messages", fault, "Give a prompt, a text that the model continues")
    with tokenizer_call(
        "messages", "the model's chat template does not take them", "Give roles and contents that it knows"
    ):
        inputs = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            tokenizer_kwargs={"verbose": False},  # the context's end has a message of its own
        )
    if not inputs["input_ids"].numel():
        fix = "Take a checkpoint whose template writes them"
        raise InputError.one("messages", "the model's chat template makes no tokens of them", fix)
    return inputs
