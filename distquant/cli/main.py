"""Parses arguments, runs a command, and prints its error: one message, exit code 2 (1 if a check failed)."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from distquant.cli.flags import add_flags, at_least
from distquant.errors import CheckFailed, DistquantError, InputError
from distquant.options import DECLARED, PlanOptions, RunOptions
from distquant.quiet import quiet_imports
from distquant.version import __version__

RUNTIMES = ("local", "torchrun", "ray")


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)  # arguments are passed on to ranks by their full names

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"distquant: {message}. See '{self.prog} --help'.\n")


def _model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder of a safetensors checkpoint, GGUF file, or cached Hugging Face id")


def _run_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runtime", choices=RUNTIMES, help="default: local for one rank, torchrun for more")
    parser.add_argument("--threads", type=at_least(1), default=0, metavar="N", help="torch threads of a rank")
    add_flags(parser, RunOptions)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="distquant", description="Load models across GPUs, quantized, with the same bits at every width."
    )
    parser.add_argument("--version", action="version", version=f"distquant {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    plan = commands.add_parser("plan", help="plan a load from configs and headers, and show the plan")
    _model_argument(plan)
    add_flags(plan, PlanOptions, without=())
    plan.add_argument("--json", metavar="FILE", help="write the whole plan")
    plan.add_argument("--html", metavar="FILE", help="write the plan as a page")

    load = commands.add_parser("load", help="load, and answer one prompt")
    _model_argument(load)
    add_flags(load, PlanOptions)
    _run_flags(load)
    load.add_argument(
        "--prompt", metavar="TEXT", help="a question, where the model has a chat template; else text to be continued"
    )
    load.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    load.add_argument(
        "--max-new-tokens", type=at_least(1), metavar="N", help="default: 40; of an answer, as in 'distquant chat'"
    )
    load.add_argument("--report", metavar="FILE", help="write the JSON report")

    chat = commands.add_parser("chat", help="load a chat model, and talk with it line by line")
    _model_argument(chat)
    add_flags(chat, PlanOptions)
    _run_flags(chat)
    chat.add_argument("--system", metavar="TEXT", help="system prompt, in place of the chat template's own")
    chat.add_argument(
        "--max-new-tokens",
        type=at_least(1),
        metavar="N",
        help="tokens of an answer, at most; default: those of the model's generation config, or 512",
    )
    chat.add_argument(
        "--temperature",
        type=at_least(0, float),
        metavar="T",
        help="0: always the likeliest token; default: as the model's generation config says",
    )
    chat.add_argument("--top-p", type=at_least(0, float), metavar="P", help="sample from the likeliest, of this share")

    verify = commands.add_parser("verify", help="load at several widths and compare the bits; exit 1 if they differ")
    _model_argument(verify)
    several = {"action": "append", "required": True, "help": "such as tp=2; give it twice or more"}
    add_flags(verify, PlanOptions, without=(*DECLARED, "device_map"), mesh=several)
    _run_flags(verify)

    perplexity = commands.add_parser("perplexity", help="measure the perplexity of a text")
    _model_argument(perplexity)
    add_flags(perplexity, PlanOptions)
    _run_flags(perplexity)
    perplexity.add_argument("--text", required=True, metavar="FILE")
    perplexity.add_argument("--window", type=at_least(2), default=256, help="tokens seen at a time")

    inspect = commands.add_parser("inspect", help="show what a checkpoint stores, and how it is quantized")
    inspect.add_argument("model")
    inspect.add_argument("--revision")

    doctor = commands.add_parser("doctor", help="show what this machine can run, and what is missing")
    doctor.add_argument("--quant", metavar="NAME")

    demo = commands.add_parser("demo", help="run the main job from end to end, on a small trained model")
    _model_argument(demo)
    add_flags(demo, PlanOptions, without=(*DECLARED, "device_map"), mesh={"default": "tp=2"})
    demo.add_argument("--prompt", default="In the beginning")
    demo.add_argument("--max-new-tokens", type=at_least(1), default=40)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0 done, 1 a check failed, 2 the input cannot work."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser().parse_args(argv)
    _quiet()
    from distquant.cli import commands, launch

    try:
        return getattr(commands, f"run_{arguments.command}")(arguments, argv)
    except CheckFailed as error:
        print(f"distquant: {error}", file=sys.stderr)
        return 1
    except InputError as error:
        launch.report_once(error)
        return 2
    except DistquantError as error:
        if launch.of_another_rank(error):
            launch.wait_for_the_end()
        prefix = "" if str(error).startswith("rank ") else launch.rank_prefix()
        print(f"distquant: {prefix}{error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not launch.lost_peer(error):
            raise
        launch.wait_for_the_end()
        first = str(error).splitlines()[0]
        print(f"distquant: {launch.rank_prefix()}the connection to another rank was lost ({first})", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _quiet() -> None:
    """Keeps the messages of libraries out of the output; their errors still reach the user."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("bitsandbytes", "torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    quiet_imports()
