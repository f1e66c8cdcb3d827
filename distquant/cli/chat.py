"""`distquant chat`: a conversation with a chat model, line by line, in every runtime.

The process that owns the terminal reads the lines, keeps the conversation and prints. The model is in this process, on
Ray workers, or on ranks; what each has to do is to answer messages piece by piece, and to stop when asked.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from distquant.cli import launch
from distquant.cli.link import Link, Remote, answer_questions, receive
from distquant.cli.ranks import Ranks
from distquant.errors import InputError, Problem
from distquant.left_behind import temporary_folder
from distquant.progress import first_rank, give_back, handed_over, working
from distquant.runtime.answer import Answer, End, answer
from distquant.runtime.tokens import Messages, has_template, template_inputs
from distquant.sharding.mesh import Mesh
from distquant.tables import without_controls

if TYPE_CHECKING:
    from distquant.runtime.ray_model import Sharded

HELP = """\
/reset   begin a new conversation
/exit    end the chat; so do Ctrl-D, and Ctrl-C before an answer
/help    show this
Ctrl-C   end an answer"""


class Model(Protocol):
    """A chat model, wherever it is."""

    def answer(self, messages: Messages, on_text: Callable[[str], None]) -> Answer:
        """Returns the answer to a conversation; calls `on_text` with each piece as it comes."""

    def stop(self) -> None:
        """Ends the answer that is under way. Called from a signal handler, so it only takes note."""


class Here:
    """A model in this process."""

    def __init__(self, model: Any, options: dict[str, Any]):
        self._model, self._options, self._stopped = model, options, False

    def answer(self, messages: Messages, on_text: Callable[[str], None]) -> Answer:
        self._stopped = False
        return answer(self._model, messages, on_text, lambda: self._stopped, **self._options)

    def stop(self) -> None:
        self._stopped = True


class OnRay:
    """A model on Ray workers."""

    def __init__(self, model: Sharded, options: dict[str, Any]):
        self._model, self._options, self._stopped = model, options, False

    def answer(self, messages: Messages, on_text: Callable[[str], None]) -> Answer:
        self._stopped = False
        pieces, taken = self._model.pieces(messages, **self._options), []
        while not self._stopped:
            try:
                taken.append(next(pieces))
            except StopIteration as end:
                return end.value
            on_text(taken[-1])
        pieces.close()
        return Answer(text="".join(taken), tokens=len(taken), end=End.STOPPED.value)

    def stop(self) -> None:
        self._stopped = True


def chat(arguments: argparse.Namespace, argv: list[str]) -> None:
    """Loads a chat model and talks until the user, or the end of standard input, ends it.

    Raises:
        InputError: with every problem, before anything is loaded; or for a line that cannot be answered.
    """
    started, options = time.monotonic(), _options(arguments)
    runtime, size = launch.choose(arguments, arguments.mesh, _problems(arguments))

    def talk(model: Model) -> None:
        name, where = arguments.quantization_config or "as stored", arguments.mesh or "one rank"
        about = f"{arguments.model}, {name}, {where} ({runtime}): ready after {time.monotonic() - started:.1f} s"
        converse(model, arguments.system, f"{about}. /help lists commands, Ctrl-D ends")

    with ExitStack() as stack:
        with working("planning") if first_rank() else nullcontext():
            model = _loaded(arguments, argv, runtime, size, options, stack)
        if model is not None:
            talk(model)
            if isinstance(model, Remote):
                model.close()
            return
    _as_rank(arguments, options, talk)


def _loaded(
    arguments: argparse.Namespace,
    argv: list[str],
    runtime: str,
    size: int,
    options: dict[str, Any],
    stack: ExitStack,
) -> Model | None:
    """Loads the model; returns None in a rank. What has to be ended afterwards is put on the stack."""
    if runtime == "ray":
        return OnRay(stack.enter_context(launch.on_ray(arguments, arguments.mesh)), options)
    if runtime == "local":
        return Here(launch.load_here(arguments, arguments.mesh, "local"), options)
    if launch.is_launched():
        return None
    listener = stack.enter_context(_listener())
    talk_at = {launch.TALK: listener.getsockname()}
    with handed_over():  # rank 0 shows the progress of all until the model is loaded
        ranks = stack.enter_context(launch.started_ranks(arguments, argv, arguments.mesh, size, talk_at))
        return Remote(_accept(listener, ranks), ranks, options)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of `generate` that the arguments ask for."""
    options: dict[str, Any] = {}
    if arguments.max_new_tokens is not None:
        options["max_new_tokens"] = arguments.max_new_tokens
    if arguments.temperature == 0:
        return {**options, "do_sample": False}
    if arguments.temperature is not None:
        options |= {"do_sample": True, "temperature": arguments.temperature}
    if arguments.top_p is not None:
        options |= {"do_sample": True, "top_p": arguments.top_p}
    return options


def _problems(arguments: argparse.Namespace) -> Iterator[Problem]:
    """Yields why a model cannot be talked with as the arguments say."""
    if arguments.top_p is not None:
        if not 0 < arguments.top_p <= 1:
            yield Problem("--top-p", f"{arguments.top_p} is not a share", "Give a number above 0, up to 1")
        elif arguments.temperature == 0:
            yield Problem("--top-p", "means nothing at --temperature 0, which does not sample", "Leave one of them out")
    try:
        replicas = Mesh.parse(arguments.mesh).dp
    except InputError:
        replicas = 1  # an invalid mesh is reported with the runtime
    if replicas > 1:
        fault = f"{arguments.mesh} makes {replicas} replicas of the model, and one conversation needs one"
        yield Problem("mesh", fault, "Use tp or ep alone")
    tokenizer = yield from launch.tokenizer_or_problems(arguments, "chat")
    if tokenizer is None:
        return
    if not has_template(tokenizer):
        fault = f"{arguments.model} has no chat template: it is a base model, which continues text"
        yield Problem("chat", fault, f"Use: distquant load {arguments.model} --prompt TEXT")
        return
    try:
        template_inputs(tokenizer, [*_first(arguments.system), {"role": "user", "content": "?"}])
    except InputError as error:
        yield from error.problems


def _first(system: str | None) -> list[dict[str, str]]:
    """Returns the messages that a conversation begins with."""
    return [] if system is None else [{"role": "system", "content": system}]


def converse(model: Model, system: str | None, about: str) -> None:
    """Reads lines, prints answers; remarks go to standard error, so that standard output is the answers alone."""
    _remark(about)
    messages = _first(system)
    try:
        for line in _lines():
            if line == "/exit":
                return
            if line == "/reset":
                messages = _first(system)
                _remark("a new conversation")
            elif re.fullmatch(r"/\w*", line):
                _remark(HELP if line == "/help" else f"unknown command {line}. There are /reset, /exit and /help")
            else:
                _ask(model, messages, line)
    except KeyboardInterrupt:
        _remark("")


def _ask(model: Model, messages: list[dict[str, str]], line: str) -> None:
    """Prints the answer to a line, and adds both to the conversation."""
    asked = {"role": "user", "content": line}
    try:
        with _interruptible(model):
            found = model.answer([*messages, asked], lambda text: print(without_controls(text), end="", flush=True))
    except InputError as error:
        if [problem.where for problem in error.problems] == ["context"]:
            error = InputError.one("context", error.problems[0].what, "Begin a new conversation with /reset")
        if not sys.stdin.isatty():  # what follows in a file was meant for an answer
            raise error from None
        _remark(f"distquant: {error}")
        return
    print(flush=True)
    messages += [asked, {"role": "assistant", "content": found.text}]
    if found.end == End.LENGTH:
        _remark(f"(ended after {found.tokens} tokens, the limit: see --max-new-tokens)")
    elif found.end == End.CONTEXT:
        _remark("(ended, because the model's context is full: /reset begins a new conversation)")
    elif found.end == End.STOPPED:
        _remark("(stopped)")


def _remark(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _lines() -> Iterator[str]:
    """Yields lines of standard input that are not empty; a terminal is prompted, and edits them."""
    number = 0
    try:
        if not sys.stdin.isatty():
            for line in sys.stdin:
                number += 1
                if line.strip():
                    yield line.strip()
            return
        _edit_lines()
        while True:
            if line := input("> ").strip():
                yield line
    except EOFError:
        _remark("")
    except UnicodeDecodeError as error:
        fault = f"after line {number} is text that is not UTF-8 ({error.reason})"
        raise InputError.one("standard input", fault, "Give UTF-8 text, one message a line") from error


def _edit_lines() -> None:
    """Gives `input` keys to edit a line and to recall earlier ones, where Python has them."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return


@contextmanager
def _interruptible(model: Model) -> Iterator[None]:
    """Lets the first Ctrl-C end the answer, and the second one the chat."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, again)
        model.stop()

    def again(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _listener() -> Iterator[socket.socket]:
    """Opens the socket at which rank 0 reports, in a folder that only this user can enter."""
    with (
        temporary_folder() as folder,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        path = os.path.join(folder, "talk")
        try:
            listener.bind(path)
        except OSError as error:
            fault = f"no socket can be made in {folder} ({error})"
            raise InputError.one("TMPDIR", fault, "Name a folder with a shorter path, on a local disk") from error
        listener.listen(1)
        yield listener


def _accept(listener: socket.socket, ranks: Ranks) -> Link:
    """Returns the link to rank 0 once the model is loaded; raises the error of a rank that fails before."""
    listener.settimeout(0.1)
    while True:
        try:
            link = Link(listener.accept()[0])
            break
        except TimeoutError:
            ranks.ended()
    while receive(link, ranks) is None:
        pass
    return link


def _as_rank(arguments: argparse.Namespace, options: dict[str, Any], talk: Callable[[Model], None]) -> None:
    """Loads this rank's part, and answers until the conversation is over.

    Under a launcher of the user's, rank 0 also reads the lines and prints, in a thread of its own.
    """
    with launch.watched():
        with working("planning") if first_rank() else nullcontext():
            model = launch.load_here(arguments, arguments.mesh, "torchrun")
        give_back()
        if os.environ["RANK"] != "0":
            answer_questions(model, None)
        elif launch.TALK in os.environ:
            end = socket.socket(socket.AF_UNIX)
            end.connect(os.environ[launch.TALK])
            answer_questions(model, Link(end))
        else:
            _here_and_there(model, options, talk)
        launch.leave()


def _here_and_there(model: Any, options: dict[str, Any], talk: Callable[[Model], None]) -> None:
    here, there = socket.socketpair()
    link = Link(here)
    errors: list[InputError] = []

    def talk_and_close() -> None:
        try:
            link.receive()  # that the model is ready
            talk(Remote(link, None, options))
        except InputError as error:
            errors.append(error)
        finally:
            link.close()

    thread = threading.Thread(target=talk_and_close, daemon=True)
    thread.start()
    answer_questions(model, Link(there))
    thread.join()
    if errors:
        raise errors[0]
