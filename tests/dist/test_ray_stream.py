"""Answers of a model on Ray workers, piece by piece, and conversations."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from chat_models import save_chat_model

import distquant as dq
from distquant import InputError
from distquant.runtime.answer import generate

GREEDY = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
ASKED = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Who is there?"}]


@pytest.fixture(scope="module")
def path(kjv_tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_chat_model(kjv_tiny, tmp_path_factory.mktemp("chat") / "model", context=512)


@pytest.fixture(scope="module")
def sharded(path: str) -> Iterator[Any]:
    with dq.ray.load(path, quantization_config="nf4", dtype="float32", mesh="tp=2", timeout=60) as model:
        yield model


def test_pieces_come_one_by_one_and_are_the_answer(sharded: Any, path: str) -> None:
    """While the first piece is there, the workers are not done with the rest."""
    stream = sharded.stream(ASKED, **{**GREEDY, "max_new_tokens": 300, "min_new_tokens": 300})
    first = next(stream)
    assert sharded._one_call.locked(), "the answer is still under way"
    pieces = [first, *stream]
    assert len(pieces) > 150
    assert "".join(pieces) == sharded.generate(ASKED, **{**GREEDY, "max_new_tokens": 300, "min_new_tokens": 300})
    loaded = dq.load(path, quantization_config="nf4", dtype="float32")
    assert "".join(sharded.stream(ASKED, **GREEDY)) == generate(loaded, ASKED, **GREEDY)


@pytest.mark.parametrize("prompt", ["In the beginning", "And the LORD said unto Moses, "])
def test_pieces_continue_a_prompt(sharded: Any, prompt: str) -> None:
    assert prompt + "".join(sharded.stream(prompt, **GREEDY)) == sharded.generate(prompt, **GREEDY)


def test_sampled_pieces_agree_over_ranks(sharded: Any) -> None:
    sampled = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 24, "min_new_tokens": 24}
    first, second = ("".join(sharded.stream(ASKED, **sampled)) for _ in range(2))
    assert first != second


def test_leaving_a_stream_ends_the_answer(sharded: Any) -> None:
    """Three hundred tokens were asked for: the generation that was left has fewer, and the next one is whole."""
    stream = sharded.pieces(ASKED, **{**GREEDY, "max_new_tokens": 300, "min_new_tokens": 300})
    next(stream)
    stream.close()
    assert not sharded._one_call.locked(), "workers are free"
    whole = sharded.generate(ASKED, **GREEDY)
    for count, _ in enumerate(sharded.stream(ASKED, **GREEDY), 1):
        if count == 2:
            break
    assert "".join(sharded.stream(ASKED, **GREEDY)) == whole


def test_other_calls_wait_for_a_stream_also_those_of_its_own_thread(sharded: Any) -> None:
    alone = sharded.generate("Blessed are", **GREEDY)
    found: list[str] = []
    stream = sharded.stream(ASKED, **GREEDY)
    next(stream)
    thread = threading.Thread(target=lambda: found.append(sharded.generate("Blessed are", **GREEDY)))
    thread.start()
    assert sharded.generate("Blessed are", **GREEDY) == alone
    thread.join()
    assert found == [alone]
    assert list(stream)


def test_messages_and_options_that_cannot_be_answered(sharded: Any) -> None:
    """Each is the answer of all ranks, and the model is usable afterwards."""
    hello = {"role": "user", "content": "Hello"}
    wrong = [
        ([{"role": "user"}], {}, r"messages\[0\]: has no content\. Write messages as"),
        ([hello, {"role": "cook", "content": "x"}], {}, r"template does not take them \(Unknown role\)"),
        ([{"role": "user", "content": "and " * 600}], {}, r"context: the conversation has \d+ tokens, .* ends at 512"),
        ([], {}, "prompt: an empty list"),
        (["one", "two"], {}, "prompt: one answer comes in pieces, not a batch"),
        ([hello], {"num_return_sequences": 2}, "num_return_sequences: pieces come of one sequence"),
    ]
    for prompt, options, message in wrong:
        with pytest.raises(InputError, match=message):
            list(sharded.stream(prompt, **options))
    with pytest.raises(InputError, match="template does not take them"):
        sharded.generate(wrong[1][0])
    assert sharded.generate([hello], **GREEDY)


def test_a_base_model_has_no_conversations(kjv_tiny: str) -> None:
    loaded = dq.load(kjv_tiny)
    with pytest.raises(InputError, match="messages: the model has no chat template: it continues text"):
        generate(loaded, ASKED)


def test_a_closed_model_says_so(sharded: Any) -> None:
    """The last one here, because it ends the workers."""
    sharded.close()
    with pytest.raises(InputError, match="ray: the model was closed"):
        next(sharded.stream(ASKED))
