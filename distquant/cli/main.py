"""Parses arguments, runs a command, and prints its error: one message, exit code 2 (1 if a check failed)."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from distquant.cli import signals
from distquant.cli.flags import MOST_THREADS, MOST_TOKENS, add_flags, at_least, group, prepare
from distquant.cli.lacks import lack_of
from distquant.cli.ranks import STARTED_HERE
from distquant.environment import is_rank
from distquant.errors import CheckFailed, DistquantError, InputError
from distquant.options import DECLARED, PlanOptions, RunOptions
from distquant.planning.arguments import ELSEWHERE, unreported
from distquant.quiet import quiet_imports
from distquant.tables import printable
from distquant.version import __version__

RUNTIMES = ("local", "torchrun", "ray")


EXAMPLES = {
    "plan": "distquant plan MODEL --quant nf4 --tp 2 --max-memory 24GiB",
    "load": "distquant load MODEL --quant nf4 --prompt 'Once upon a time'",
    "chat": "distquant chat MODEL --quant nf4 --tp 2",
    "verify": "distquant verify MODEL --quant nf4 --tp 1 --tp 2",
    "perplexity": "distquant perplexity MODEL --quant nf4 --text wiki.txt",
    "inspect": "distquant inspect MODEL",
    "doctor": "distquant doctor --quant nf4",
    "demo": "distquant demo examples/models/kjv-tiny",
}
"""An example of each command."""

FIRST = """first steps:
  hf download HuggingFaceTB/SmolLM2-135M-Instruct          once: distquant itself downloads nothing
  distquant plan HuggingFaceTB/SmolLM2-135M-Instruct -q nf4
  distquant load HuggingFaceTB/SmolLM2-135M-Instruct -q nf4 --prompt 'What is gravity?'

'distquant COMMAND --help' shows the options of a command."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any):
        # Arguments are passed on to ranks by their full names.
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"distquant: {printable(message)}. See '{self.prog} --help'.\n")

    def unknown(self, left: Sequence[str]) -> None:
        """Ends with an error for arguments that the command does not have."""
        options = [argument.partition("=")[0] for argument in left if argument.startswith("-")]
        known = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        hints = dict.fromkeys(hint for option in options if (hint := _meant(option, known)))
        advice = f" Did you mean {' and '.join(hints)}?" if hints else ""
        self.exit(
            2, f"distquant: unrecognized arguments: {printable(' '.join(left))}.{advice} See '{self.prog} --help'.\n"
        )


def _meant(option: str, known: Sequence[str]) -> str | None:
    name = option.strip("-").replace("-", "_")
    other = ELSEWHERE.get(name, "")
    flag = "--quant" if other == "quantization_config" else "--" + other.replace("_", "-")
    if flag in known:
        return flag
    # Without the dashes, which all have: they would make short names alike.
    near = difflib.get_close_matches(name.replace("_", "-"), [flag.removeprefix("--") for flag in known], 1)
    return f"--{near[0]}" if near else None


def _model_argument(parser: argparse.ArgumentParser) -> None:
    text = "folder of a safetensors checkpoint, GGUF file, or id in the Hugging Face cache (nothing is downloaded)"
    group(parser, "model").add_argument("model", metavar="MODEL", help=text)


def _run_flags(parser: argparse.ArgumentParser) -> None:
    running = group(parser, "running")
    running.add_argument("--runtime", choices=RUNTIMES, help="default: local for one rank, torchrun for more")
    threads = "torch threads of a rank; default: OMP_NUM_THREADS, or an equal part of the cores"
    running.add_argument("--threads", type=at_least(1, most=MOST_THREADS), default=0, metavar="N", help=threads)
    add_flags(parser, RunOptions)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="distquant",
        description="Load models across GPUs, quantized, with the same bits at every width.",
        epilog=FIRST,
    )
    parser.add_argument("--version", action="version", version=f"distquant {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def command(name: str, text: str) -> _Parser:
        added: _Parser = commands.add_parser(name, help=text, description=text, epilog=f"example:\n  {EXAMPLES[name]}")
        added.set_defaults(parser=added)
        return added

    plan = command("plan", "plan a load from configs and headers, and show the plan")
    _model_argument(plan)
    add_flags(plan, PlanOptions, without=())
    group(plan, "output").add_argument("--json", metavar="FILE", help="write the whole plan")
    group(plan, "output").add_argument("--html", metavar="FILE", help="write the plan as a page")

    load = command("load", "load, and answer one prompt")
    _model_argument(load)
    add_flags(load, PlanOptions)
    _run_flags(load)
    output = group(load, "output")
    output.add_argument("-v", "--verbose", action="store_true", help="also show each rank, its stages, and kernels")
    output.add_argument(
        "--prompt", metavar="TEXT", help="a question, where the model has a chat template; else text to be continued"
    )
    output.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    _new_tokens(output, "tokens of the answer; default: as in 'distquant chat', and 40 for continued text")
    output.add_argument("--report", metavar="FILE", help="write the JSON report")

    _chat_flags(command("chat", "load a chat model, and talk with it line by line"))

    verify = command("verify", "load at several widths and compare the bits; exit 1 if they differ")
    _model_argument(verify)
    several = {"action": "append", "help": "such as tp=2; give it twice or more"}
    add_flags(verify, PlanOptions, without=(*DECLARED, "device_map"), mesh=several)
    _run_flags(verify)

    perplexity = command("perplexity", "measure the perplexity of a text")
    _model_argument(perplexity)
    add_flags(perplexity, PlanOptions)
    _run_flags(perplexity)
    output = group(perplexity, "output")
    output.add_argument("--text", required=True, metavar="FILE", help="text file in UTF-8")
    output.add_argument("--window", type=at_least(2), default=256, metavar="N", help="tokens seen at a time")

    inspect = command("inspect", "show what a checkpoint stores, and how it is quantized")
    _model_argument(inspect)
    model = group(inspect, "model")
    model.add_argument("--revision", help="Revision of a cached id.")
    model.add_argument("--cache-dir", metavar="FOLDER", help="folder in which a cached id is looked up")

    doctor = command("doctor", "show what this machine can run, and what is missing")
    doctor.add_argument("-q", "--quant", metavar="NAME", help="one method alone")

    demo = command("demo", "run the main job from end to end, on a small trained model")
    _model_argument(demo)
    add_flags(demo, PlanOptions, without=(*DECLARED, "device_map"))
    demo.set_defaults(default_mesh="tp=2")
    output = group(demo, "output")
    output.add_argument("--prompt", default="In the beginning", metavar="TEXT", help="text that the model goes on from")
    tokens = at_least(1, most=MOST_TOKENS)
    output.add_argument("--max-new-tokens", type=tokens, default=40, metavar="N", help="tokens of the answer")
    return parser


def _chat_flags(chat: _Parser) -> None:
    _model_argument(chat)
    add_flags(chat, PlanOptions)
    _run_flags(chat)
    output = group(chat, "output")
    output.add_argument("--system", metavar="TEXT", help="system prompt, in place of the chat template's own")
    _new_tokens(output, "tokens of an answer, at most; default: those of the model's generation config, or 512")
    output.add_argument(
        "--temperature",
        type=at_least(0, float),
        metavar="T",
        help="0: always the likeliest token; default: as the model's generation config says",
    )
    output.add_argument(
        "--top-p", type=at_least(0, float), metavar="P", help="sample from the likeliest, of this share"
    )


def _new_tokens(output: argparse._ArgumentGroup, text: str) -> None:
    output.add_argument("--max-new-tokens", type=at_least(1, most=MOST_TOKENS), metavar="N", help=text)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments of a command; prints help or one error, and exits, where there is none."""
    parser = build_parser()
    arguments, left = parser.parse_known_args(argv)
    if arguments.command is None and not left:
        parser.print_help()
        parser.exit()
    of_command: _Parser = vars(arguments).pop("parser", parser)
    if left:
        of_command.unknown(left)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0 done, 1 a check failed, 2 the input cannot work, 130 or 143 a signal."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if is_rank():  # its launcher decides when it ends, and tells it by signals that must not wait
            return _run(parse(argv), argv)
        with signals.as_exits():
            return _run(parse(argv), argv)
    except (KeyboardInterrupt, SystemExit) as error:
        if is_rank() and isinstance(error, KeyboardInterrupt):
            return 130
        code = signals.code_of(error)
        if code is None:
            raise
        return code


def _run(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Runs a command and prints its error; returns its exit code."""
    try:
        notes = prepare(arguments)
    except InputError as error:
        _report_early(error)
        return 2
    for note in unreported(notes):
        # Ranks that the command line has started read the same arguments again.
        if os.environ.get("RANK", "0") == "0" and STARTED_HERE not in os.environ:
            print(f"distquant: {printable(note)}", file=sys.stderr)
    _quiet()
    from distquant.progress import first_rank, working

    ranks = os.environ.get("WORLD_SIZE", "1")
    text = "importing torch and transformers" if ranks == "1" else f"starting {ranks} ranks"
    try:
        with working(text, at_once=True) if first_rank() else nullcontext():
            from distquant.cli import commands, launch
    except (OSError, ImportError, RuntimeError, MemoryError) as error:
        if (lack := lack_of(error)) is None:
            raise
        _report_early(InputError([lack]))
        return 2

    try:
        return getattr(commands, f"run_{arguments.command}")(arguments, argv)
    except CheckFailed as error:
        launch.report(error)
        return 1
    except InputError as error:
        launch.report_once(error)
        return 2
    except DistquantError as error:
        if launch.of_another_rank(error):
            launch.wait_for_the_end()
        prefix = "" if str(error).startswith("rank ") else launch.rank_prefix()
        launch.report(error, prefix)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ImportError, RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and launch.lost_peer(error):
            launch.wait_for_the_end()
            first = str(error).splitlines()[0]
            launch.report(f"the connection to another rank was lost ({first})", launch.rank_prefix())
            return 2
        if (lack := lack_of(error)) is None:
            raise
        launch.report(InputError([lack]), launch.rank_prefix())
        return 2


def _report_early(error: InputError) -> None:
    """Prints an error that was found before torch is imported; among ranks, each has found it, and one tells it."""
    if os.environ.get("RANK", "0") != "0":
        from distquant.cli import launch

        launch.report_once(error)
    else:
        from distquant.cli.terminal import show_error

        show_error(error)


def _quiet() -> None:
    """Keeps the messages of libraries out of the output; their errors still reach the user."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    quiet_imports()
