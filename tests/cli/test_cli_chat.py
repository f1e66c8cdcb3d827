"""`distquant chat` from end to end: lines from a pipe, answers piece by piece, Ctrl-C, and wrong input."""

from __future__ import annotations

import functools
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from chat_models import TEMPLATE, save_chat_model
from cli_runs import Command, tells

import distquant as dq
from distquant.runtime.answer import answer

GREEDY = ("--quant", "nf4", "--dtype", "float32", "--temperature", "0")


RAY = pytest.param("ray", marks=pytest.mark.wide)
RANKS = pytest.param(("--mesh", "tp=2"), marks=pytest.mark.wide, id="torchrun")


@pytest.fixture(scope="module")
def model(kjv_tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_chat_model(kjv_tiny, tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture
def chat(command: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `distquant chat` in this process with these bytes as standard input."""

    def run(lines: bytes, *arguments: object) -> Any:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
        return command("chat", *arguments, "--threads", "1")

    return run


def said(loaded: Any, conversation: list[dict[str, str]], line: str, tokens: int) -> str:
    """The answer to a line after a conversation, which both become part of."""
    conversation.append({"role": "user", "content": line})
    text = answer(loaded, conversation, max_new_tokens=tokens, do_sample=False).text
    conversation.append({"role": "assistant", "content": text})
    return text


def test_a_conversation_and_its_commands(model: str, chat: Command) -> None:
    lines = b"Who is there?\n\n  \nAnd then?\n/help\n/answer\n/reset\nWho is there?\n/exit\nnobody hears this\n"
    done = chat(lines, model, *GREEDY, "--max-new-tokens", "8", "--system", "Be brief")
    assert done.code == 0
    loaded = dq.load(model, quantization_config="nf4", dtype="float32")
    conversation = [{"role": "system", "content": "Be brief"}]
    first, second = (said(loaded, conversation, line, 8) for line in ("Who is there?", "And then?"))
    assert done.out == f"{first}\n{second}\n{first}\n"
    assert "(ended after 8 tokens, the limit: see --max-new-tokens)" in done.err
    assert "/reset   begin a new conversation" in done.err
    assert "unknown command /answer. There are /reset, /exit and /help" in done.err


@pytest.mark.parametrize("runtime", ["local", pytest.param("torchrun", marks=pytest.mark.wide), RAY])
def test_answers_stream_and_interrupts_end_them_and_then_the_chat(model: str, runtime: str) -> None:
    """Every wait here is for what the chat writes: an answer is interrupted while it is on its way."""
    where = [] if runtime == "local" else ["--mesh", "tp=2", "--runtime", runtime]
    command = [sys.executable, "-m", "distquant", "chat", model, *GREEDY, "--threads", "1", *where]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # Processes that run tests side by side ignore Ctrl-C, and what they start would, too.
    pipes["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen([*command, "--max-new-tokens", "900"], env=environment, bufsize=0, **pipes) as run:
        try:
            seen = talk_and_interrupt(run)
            errors = run.stderr.read().decode()
            assert run.wait(120) == 0, errors
        finally:
            run.kill()
    assert "Traceback" not in seen[1] + errors
    loaded = dq.load(model, quantization_config="nf4", dtype="float32")
    whole = said(loaded, [], "Who is there?", 900)
    assert whole.startswith(seen[0].rstrip("\n"))
    assert len(seen[0]) < len(whole) / 2, "the answer was interrupted"


def talk_and_interrupt(run: subprocess.Popen[bytes]) -> tuple[str, str]:
    """Output and remarks up to the end of a chat: an interrupt while an answer comes, and one after it."""
    assert run.stdin is not None and run.stdout is not None and run.stderr is not None
    run.stdin.write(b"Who is there?\n")
    text = run.stdout.read(1)  # the first piece has come, and hundreds have not
    children = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGINT)
    remarks = b""
    while b"(stopped)\n" not in remarks:
        remarks += run.stderr.readline()
    while not text.endswith(b"\n"):
        text += run.stdout.read(1)
    run.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs(children, timeout=120)
    assert not alive
    return text.decode(), remarks.decode()


@pytest.mark.parametrize("runtime", ["torchrun", RAY])
def test_every_runtime_gives_the_answers_of_one_process(model: str, runtime: str, workdir: Path) -> None:
    command = [sys.executable, "-m", "distquant", "chat", model, *GREEDY, "--mesh", "tp=2", "--runtime", runtime]
    more = ["--max-new-tokens", "12", "--threads", "1"]
    lines = "Who is there?\nAnd then?\n/reset\nWho is there?\n"
    done = subprocess.run([*command, *more], input=lines, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    loaded, conversation = dq.load(model, quantization_config="nf4", dtype="float32"), []
    first, second = (said(loaded, conversation, line, 12) for line in lines.splitlines()[:2])
    assert done.stdout == f"{first}\n{second}\n{first}\n"


@pytest.mark.wide
def test_ranks_of_the_users_own_launcher_talk_through_rank_0(model: str, workdir: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = ["distquant", "chat", model, *GREEDY, "--mesh", "tp=2", "--max-new-tokens", "12", "--threads", "1"]
    done = subprocess.run([*launcher, *command], input="Who is there?\n", capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    loaded = dq.load(model, quantization_config="nf4", dtype="float32")
    assert done.stdout == said(loaded, [], "Who is there?", 12) + "\n"


def test_ranks_wait_for_a_silent_user_and_a_lost_one_is_named(model: str, workdir: Path) -> None:
    """The user is silent for longer than ranks wait for each other; later one of them is killed."""
    command = [sys.executable, "-m", "distquant", "chat", model, *GREEDY, "--mesh", "tp=2", "--timeout", "8"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, "--max-new-tokens", "1", "--threads", "1"], bufsize=0, **pipes) as run:  # type: ignore[call-overload]
        try:
            for _ in range(2):
                run.stdin.write(b"Who is there?\n")
                assert run.stdout.readline()
                time.sleep(10)
            ranks = [one for one in psutil.Process(run.pid).children() if one.environ().get("RANK")]
            ranks[1].kill()
            run.stdin.write(b"Who is there?\n")
            remarks = run.stderr.read().decode()
            assert run.wait(120) == 2
        finally:
            run.kill()
    message = "distquant: rank 1: was killed by signal 9, and the other ranks were stopped. If memory ran out"
    assert [line for line in remarks.splitlines() if line.startswith(message)]
    assert "Traceback" not in remarks
    assert not psutil.wait_procs(ranks, timeout=60)[1]


@pytest.mark.parametrize("where", [pytest.param((), id="local"), RANKS])
def test_a_long_conversation_ends_with_one_message(kjv_tiny: str, chat: Command, tmp_path: Path, where: Any) -> None:
    model = save_chat_model(kjv_tiny, tmp_path / "model", context=48)
    done = chat(b"And what came to pass?\n" * 20, model, *GREEDY, "--max-new-tokens", "90", *where)
    assert done.code == 2
    assert done.out
    assert "(ended, because the model's context is full: /reset begins a new conversation)" in done.err
    (last,) = [line for line in done.err.splitlines() if line.startswith("distquant: ")]
    assert last.startswith("distquant: context: the conversation has ")
    assert last.endswith("and the model's context ends at 48. Begin a new conversation with /reset")


def test_a_base_model_is_told_how_to_be_asked(kjv_tiny: str, chat: Command) -> None:
    tells(chat(b"", kjv_tiny), rf"^chat: {kjv_tiny} has no chat template: .*\. Use: distquant load {kjv_tiny} --prompt")


def test_all_problems_are_told_before_the_load(model: str, kjv_tiny: str, chat: Command) -> None:
    early = chat(b"", kjv_tiny, "--mesh", "dp=2", "--runtime", "local", "--top-p", "2", "--quant", "nf5")
    assert [each.split(":")[0] for each in early.problems] == ["mesh", "quantization_config"]
    late = chat(b"", kjv_tiny, "--mesh", "dp=2", "--top-p", "2")
    assert [each.split(":")[0] for each in late.problems] == ["--top-p", "mesh", "chat"]
    tells(chat(b"", model, "--temperature", "0", "--top-p", "0.5"), "^--top-p: means nothing at --temperature 0")
    assert "'-1' is not a number of at least 0" in chat(b"", model, "--temperature", "-1").err


def test_a_template_that_refuses_the_system_prompt(model: str, chat: Command, tmp_path: Path) -> None:
    strict = TEMPLATE.replace("['system', ", "[")
    folder = save_chat_model(model, tmp_path / "strict", template=strict)
    tells(
        chat(b"", folder, "--system", "Be brief"), r"^messages: the model's chat template does not take them \(Unknown"
    )


def test_lines_that_are_not_text(model: str, chat: Command) -> None:
    done = chat(b"Who is there?\n\xff\xfe\n", model, *GREEDY, "--max-new-tokens", "4")
    assert done.code == 2
    assert "distquant: standard input: after line " in done.err
    assert "Give UTF-8 text, one message a line" in done.err


def test_a_prompt_is_a_question_to_a_chat_model(model: str, kjv_tiny: str, command: Command) -> None:
    loaded = dq.load(model, quantization_config="nf4", dtype="float32")
    limit = ("--quant", "nf4", "--dtype", "float32", "--max-new-tokens", "12")
    text = said(loaded, [], "In the beginning", 12)
    line = "answer (the model's chat template was applied, --raw leaves it out; ended by --max-new-tokens):"
    assert command("load", model, "--prompt", "In the beginning", *limit).out.endswith(f"\n\n{line}\n{text}\n")
    raw = command("load", model, "--prompt", "In the beginning", "--raw", *limit)
    base = command("load", kjv_tiny, "--prompt", "In the beginning", *limit)
    assert raw.out.partition("\n\n")[2] == base.out.partition("\n\n")[2]
    assert raw.out.partition("\n\n")[2].startswith("In the beginning")
