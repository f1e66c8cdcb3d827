"""Arguments, dispatch, and how errors are told: one message, exit code 2 (1 where a check failed), no traceback."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from distquant.errors import CheckFailed, DistquantError, InputError
from distquant.kernels.choice import Kernel
from distquant.options import FORWARDS, IO_MODES
from distquant.planning.expert_parallel import ALL_REDUCE, DISPATCH
from distquant.quiet import quiet_imports
from distquant.version import __version__

RUNTIMES = ("local", "torchrun", "ray")
KERNELS = [kernel.value for kernel in Kernel]


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)  # arguments are passed on to ranks by their full names

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"distquant: {message}. See '{self.prog} --help'.\n")


def _at_least(least: float, kind: type = int) -> Callable[[str], Any]:
    """A type for argparse: a number with a lower limit."""

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= least:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} of at least {least}")
        return value

    return number


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder of a safetensors checkpoint, or a cached Hugging Face id")
    parser.add_argument(
        "--quant", metavar="NAME", help="short name, JSON text or JSON file; default: the checkpoint's own"
    )
    parser.add_argument("--dtype", default="auto", help="bfloat16, float16, float32 or auto")
    parser.add_argument("--max-memory", metavar="SIZE", help="bytes that one rank may fill, such as 24GiB")
    parser.add_argument("--staging", metavar="SIZE", default="512MiB", help="bytes that weights may pass through")
    parser.add_argument(
        "--on-unsupported",
        metavar="WHAT",
        default="error",
        help="skip: plan the tensors of an unknown method as stored",
    )
    parser.add_argument(
        "--dispatch",
        choices=tuple(DISPATCH),
        default=ALL_REDUCE,
        help="how tokens reach experts on other ranks of ep: all of them hold the same tokens, or each its own",
    )
    parser.add_argument("--revision", help="revision of a cached id")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the checkpoint")


def _run_arguments(parser: argparse.ArgumentParser, *, many: bool = False) -> None:
    if many:
        parser.add_argument(
            "--mesh", action="append", required=True, metavar="MESH", help="such as tp=2; give it twice"
        )
    else:
        parser.add_argument("--mesh", metavar="MESH", help="such as tp=2 or dp=2,tp=4")
        parser.add_argument("--device-map", metavar="MAP", help="auto, a device or JSON; one process, many devices")
    parser.add_argument("--runtime", choices=RUNTIMES, help="default: local for one rank, torchrun for more")
    parser.add_argument("--threads", type=_at_least(1), default=0, help="torch threads of a rank")
    parser.add_argument("--timeout", type=_at_least(0.1, float), help="seconds that a rank waits for the others")
    parser.add_argument("--kernel", choices=KERNELS, default="auto", help="which kernels quantize (default: auto)")
    parser.add_argument("--forward", choices=FORWARDS, default="auto", help="what multiplies weights kept as stored")
    parser.add_argument("--io", choices=IO_MODES, default="auto", help="read through the page cache or past it")
    parser.add_argument("--trace", metavar="FILE", help="write a trace of all ranks' stages, for Perfetto")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="distquant", description="Load models across GPUs, quantized, with the same bits at every width."
    )
    parser.add_argument("--version", action="version", version=f"distquant {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    plan = commands.add_parser("plan", help="what a load would do; reads headers only")
    _model_arguments(plan)
    plan.add_argument("--mesh", metavar="MESH")
    plan.add_argument("--device-map", metavar="MAP")
    plan.add_argument("--ranks-per-node", type=_at_least(1), help="ranks that share a node (default: 8)")
    plan.add_argument("--capability", metavar="X.Y", help="compute capability of the devices")
    plan.add_argument("--json", metavar="FILE", help="write the whole plan")
    plan.add_argument("--html", metavar="FILE", help="write the plan as a page")

    load = commands.add_parser("load", help="load, and answer a prompt")
    _model_arguments(load)
    _run_arguments(load)
    load.add_argument("--prompt")
    load.add_argument("--max-new-tokens", type=_at_least(1), default=40)
    load.add_argument("--report", metavar="FILE", help="write the JSON report")

    verify = commands.add_parser("verify", help="load at several widths and compare the bits; exit 1 if they differ")
    _model_arguments(verify)
    _run_arguments(verify, many=True)

    perplexity = commands.add_parser("perplexity", help="perplexity of a text")
    _model_arguments(perplexity)
    _run_arguments(perplexity)
    perplexity.add_argument("--text", required=True, metavar="FILE")
    perplexity.add_argument("--window", type=_at_least(2), default=256, help="tokens seen at a time")

    inspect = commands.add_parser("inspect", help="what lies in a checkpoint, and how it is quantized")
    inspect.add_argument("model")
    inspect.add_argument("--revision")

    doctor = commands.add_parser("doctor", help="what this machine can run, and what is missing")
    doctor.add_argument("--quant", metavar="NAME")

    demo = commands.add_parser("demo", help="the main job from end to end, on a small trained model")
    _model_arguments(demo)
    demo.add_argument("--mesh", default="tp=2")
    demo.add_argument("--prompt", default="In the beginning")
    demo.add_argument("--max-new-tokens", type=_at_least(1), default=40)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0 done, 1 a check failed, 2 what the user gave cannot work."""
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
        launch.tell_once(error)
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
    """Keeps the libraries' chatter out of the output; errors of theirs still reach the user."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("bitsandbytes", "torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    quiet_imports()
