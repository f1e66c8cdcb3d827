"""A conversation between the process that owns the terminal and rank 0: lines of JSON over a socket of this machine.

The terminal's process sends `{"messages": ..., "options": ...}` and, while it waits, `{"stop": true}`. Rank 0 sends
`{"ready": true}` once the model is loaded, then `{"text": ...}` for each piece, and at the end `{"answer": ...}` or
`{"problems": ...}`. Whoever closes the socket ends the conversation.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from distquant.cli.ranks import Ranks
from distquant.errors import InputError, Problem
from distquant.runtime.answer import Answer, answer
from distquant.runtime.tokens import Messages

POLL = 0.1
"""Seconds between looks at the ranks while rank 0 says nothing."""


class Link:
    """One end of the socket."""

    def __init__(self, end: socket.socket):
        self._socket, self._rest = end, b""

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message; raises `EOFError` if the other end was closed."""
        self._socket.settimeout(None)
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except ConnectionError:
            raise EOFError from None

    def receive(self, seconds: float | None = None) -> dict[str, Any] | None:
        """Returns the next message, or None if there is none within `seconds`.

        Raises:
            EOFError: the other end was closed.
        """
        self._socket.settimeout(seconds)
        while b"\n" not in self._rest:
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                return None
            except ConnectionError:
                data = b""
            if not data:
                raise EOFError
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        self._socket.close()


class Remote:
    """The model behind a link, as the terminal's process sees it."""

    def __init__(self, link: Link, ranks: Ranks | None, options: dict[str, Any]):
        """Takes the link, the ranks (None if this process did not start them), and options of `generate`."""
        self._link, self._ranks, self._options, self._stopped = link, ranks, options, False

    def answer(self, messages: Messages, on_text: Callable[[str], None]) -> Answer:
        self._stopped, sent = False, False
        with _end_explained(self._ranks):
            self._link.send({"messages": list(messages), "options": self._options})
            while True:
                message = receive(self._link, self._ranks)
                if self._stopped and not sent:
                    self._link.send({"stop": True})
                    sent = True
                if message is None:
                    continue
                if "answer" in message:
                    return Answer(**message["answer"])
                if "problems" in message:
                    raise InputError([Problem(**problem) for problem in message["problems"]])
                on_text(message["text"])

    def stop(self) -> None:
        self._stopped = True

    def close(self) -> None:
        """Ends the conversation, and waits for the ranks that this process has started."""
        self._link.close()
        if self._ranks is not None:
            self._ranks.wait()


def receive(link: Link, ranks: Ranks | None) -> dict[str, Any] | None:
    """Returns the next message of rank 0, or None for now; raises the error of a rank that has failed."""
    with _end_explained(ranks):
        message = link.receive(POLL)
    if message is None and ranks is not None:
        ranks.ended()
    return message


@contextmanager
def _end_explained(ranks: Ranks | None) -> Iterator[None]:
    """Raises the error of the rank that failed where the other end is closed unexpectedly."""
    try:
        yield
    except EOFError:
        if ranks is not None:
            ranks.wait()
        raise InputError.one("rank 0", "ended without an answer", "See its output above") from None


class Questions:
    """Questions that rank 0 hears over a link, taken in by a thread of its own so that an answer can be stopped."""

    def __init__(self, link: Link):
        self._link = link
        self._questions: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.stopped = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            while (message := self._link.receive()) is not None:
                if "stop" in message:
                    self.stopped.set()
                else:
                    self.stopped.clear()
                    self._questions.put(message)
        except EOFError:
            self.stopped.set()
            self._questions.put(None)

    def next(self, seconds: float) -> dict[str, Any] | None:
        """Returns the next question, None if the conversation is over, or an empty one if nobody asks for a while."""
        try:
            return self._questions.get(timeout=seconds)
        except queue.Empty:
            return {}

    def say(self, message: dict[str, Any]) -> None:
        """Sends to the terminal's process, unless it has gone; the conversation ends then."""
        try:
            self._link.send(message)
        except EOFError:
            self.stopped.set()


def answer_questions(model: Any, link: Link | None) -> None:
    """Answers what comes over rank 0's link until it is closed. All ranks call it; the others have no link.

    While nobody asks, rank 0 gives a sign of life in time, because ranks do not wait for each other without end.
    """
    comm = model.distquant.comm
    questions = None if link is None else Questions(link)
    if questions is not None:
        questions.say({"ready": True})
    while True:
        question = comm.share(None if questions is None else questions.next(comm.timeout / 4))
        if question is None:
            return
        if question:
            _answer(model, question, questions)


def _answer(model: Any, question: dict[str, Any], questions: Questions | None) -> None:
    own: dict[str, Any] = {}
    if questions is not None:
        own = {"on_text": lambda text: questions.say({"text": text}), "stopped": questions.stopped.is_set}
    try:
        found = answer(model, question["messages"], **own, **question["options"])
    except InputError as error:  # on all ranks alike
        reply: dict[str, Any] = {"problems": [dataclasses.asdict(problem) for problem in error.problems]}
    else:
        reply = {"answer": dataclasses.asdict(found)}
    if questions is not None:
        questions.say(reply)
