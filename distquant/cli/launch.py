"""Runs a query in the chosen runtime. Ranks of torchrun are started here unless a launcher has started them."""

from __future__ import annotations

import argparse
import dataclasses
import glob
import json
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distquant.cli import terminal
from distquant.cli.flags import read_flags
from distquant.environment import rank_threads
from distquant.errors import DistquantError, InputError, Problem, Problems, RankError, one_line
from distquant.model import source_of, tokenizer_file_problems
from distquant.options import PlanOptions, RunOptions
from distquant.planning.validation import check_supported
from distquant.progress import give_back, handed_over, status
from distquant.runtime.measure import check_rank_count
from distquant.runtime.query import Outcome, Query
from distquant.sharding.mesh import Mesh

OUTCOME = "DISTQUANT_OUTCOME"
"""Environment variable: the file that rank 0 writes the outcome to, if the command line has started the ranks."""

PATIENCE = 30.0
"""Seconds that a rank waits for another to report the error, and for the launcher to stop this one.

Ranks that share few cores meet the same error many seconds apart.
"""


LAST_DRAWING = 1.0
"""Seconds after which rank 0 has learned of another rank's failure, and draws no more."""


class Handled(DistquantError):
    """A rank has already reported the error; `code` is the exit code."""

    def __init__(self, code: int):
        self.code = code
        super().__init__(f"exit code {code}")


def run(arguments: argparse.Namespace, argv: list[str], query: Query, mesh: str | None) -> Outcome | None:
    """Loads the model and runs the query; returns None on ranks whose outcome rank 0 prints."""
    from distquant.api import plan

    launched, size, problems = is_launched(), Mesh.parse(mesh).size, Problems()
    runtime = arguments.runtime or ("torchrun" if launched or size > 1 else "local")
    if OUTCOME not in os.environ:  # else the process that started this rank has checked it
        problems.extend(token_problems(arguments, query))
    if problems:
        raise all_problems(problems, arguments, mesh)
    if runtime == "ray":
        return _on_ray(arguments, query, mesh)
    if runtime == "local":
        return _here(arguments, query, mesh, "local")
    if launched:
        return _here(arguments, query, mesh, "torchrun")
    check_supported(plan(arguments.model, **load_options(arguments, mesh)))  # before ranks are started
    check_rank_count(size)
    return _start_ranks(arguments, argv, size)


def is_launched() -> bool:
    """Returns True if a launcher (torchrun, srun, ours) has started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def all_problems(problems: Problems, arguments: argparse.Namespace, mesh: str | None) -> InputError:
    """Returns the error with these problems and those that planning finds."""
    from distquant.api import plan

    try:
        plan(arguments.model, **load_options(arguments, mesh))
    except InputError as error:
        problems.extend(error.problems)
    return InputError(problems)


def token_problems(arguments: argparse.Namespace, query: Query) -> Iterator[Problem]:
    """Yields why a prompt or text cannot be given to the model, before anything is loaded."""
    texts = [("--prompt", query.prompt, 1), ("--text", query.text and query.text[:1000], 2)]
    texts = [(option, text, least) for option, text, least in texts if text is not None]
    if not texts:
        return
    from transformers import AutoTokenizer

    from distquant.checkpoint.locate import locate

    try:
        folder, _ = locate(arguments.model, arguments.revision, arguments.cache_dir)
    except InputError:
        return  # planning reports it
    if unreadable := list(tokenizer_file_problems(folder)):
        yield from unreadable
        return
    for option, text, least in texts:
        try:
            source, gguf = source_of(folder)
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=arguments.trust_remote_code, **gguf)
        except (ValueError, OSError, KeyError, ImportError) as error:
            fault = f"transformers cannot load a tokenizer from {folder} ({one_line(error)})"
            yield Problem(option, fault, "Put the model's tokenizer.json there")
            continue
        count = len(tokenizer(text).input_ids)
        if count < least:
            yield Problem(option, f"has {count} tokens, {least} are needed", "Give a longer text")


def load_options(arguments: argparse.Namespace, mesh: str | None) -> dict[str, Any]:
    """Returns the options of the plan that the command line gave, with this mesh."""
    return {**read_flags(arguments, PlanOptions), "mesh": mesh}


def _here(arguments: argparse.Namespace, query: Query, mesh: str | None, runtime: str) -> Outcome | None:
    import torch

    from distquant.api import load
    from distquant.runtime.query import perform

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if runtime == "torchrun" else 1
    torch.set_num_threads(arguments.threads or rank_threads(ranks))
    rank = int(os.environ.get("RANK", "0")) if runtime == "torchrun" else 0
    model = load(arguments.model, **load_options(arguments, mesh), **read_flags(arguments, RunOptions))
    outcome = perform(model, query, runtime)
    status("ending the ranks")
    if runtime == "torchrun":
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank != 0:
        return None
    if OUTCOME in os.environ:
        with open(os.environ[OUTCOME], "w") as file:
            json.dump(outcome.to_dict(), file)
        give_back()
        return None
    return outcome


def _on_ray(arguments: argparse.Namespace, query: Query, mesh: str | None) -> Outcome:
    try:
        status("importing Ray")
        from distquant.runtime import ray
    except ImportError as error:
        raise InputError.one(
            "--runtime ray", f"ray cannot be imported ({error})", "Run: pip install 'distquant[ray]'"
        ) from error
    options = {**load_options(arguments, mesh), **read_flags(arguments, RunOptions)}
    if options.pop("device_map", None) is not None:
        raise InputError.one("device_map", "Ray workers hold one device each", "Use --mesh, or --runtime local")
    with ray.load(arguments.model, **options, threads=arguments.threads or None) as sharded:
        status("computing the fingerprint")
        return sharded.perform(query)


def _start_ranks(arguments: argparse.Namespace, argv: list[str], size: int) -> Outcome:
    """Starts the ranks with torch's elastic launcher, and reads the outcome that rank 0 writes."""
    status(f"starting {size} ranks")
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from distquant.cli import rendezvous
    from distquant.runtime.process_group import stay_on_this_machine

    threads = arguments.threads or rank_threads(size)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    stay_on_this_machine()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=uuid.uuid4().hex,
        rdzv_backend=rendezvous.register(),
        max_restarts=0,
        monitor_interval=0.1,
    )
    with tempfile.TemporaryDirectory(prefix="distquant-") as folder:
        os.environ[OUTCOME] = path = os.path.join(folder, "outcome.json")
        try:
            with _own_handlers_afterwards(), handed_over():
                elastic_launch(config, sys.executable)("-m", "distquant", *argv)
        except ChildFailedError as error:
            _show_errors_of_ranks(path)
            rank, failure = error.get_first_failure()
            if failure.exitcode in (1, 2):
                raise Handled(failure.exitcode) from None
            how, fix = f"ended with exit code {failure.exitcode}", "See its output above"
            if failure.exitcode < 0:
                how, fix = f"was killed by signal {-failure.exitcode}", "If memory ran out (signal 9), use more ranks"
            raise InputError.one(f"rank {rank}", f"{how}, and the other ranks were stopped", fix) from None
        finally:
            del os.environ[OUTCOME]
        with open(path) as file:
            return Outcome(**json.load(file))


@contextmanager
def _own_handlers_afterwards() -> Iterator[None]:
    """Restores the signal handlers that torch's launcher replaces and does not restore (`PContext.start`)."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) != handler:  # None: not set from Python
                signal.signal(number, handler)


def lost_peer(error: RuntimeError) -> bool:
    """Returns True if a collective of this rank failed because another rank ended, which reports its own error."""
    if not is_launched() or "torch" not in sys.modules:
        return False
    from distquant.runtime.process_group import is_lost_peer

    return is_lost_peer(error)


def of_another_rank(error: DistquantError) -> bool:
    """Returns True if this process is a rank that stopped because another rank failed, which reports its own error."""
    return is_launched() and isinstance(error, RankError) and error.rank != int(os.environ["RANK"])


def wait_for_the_end() -> None:
    """Gives the failing rank the time to report its error, and the launcher the time to stop this rank."""
    time.sleep(PATIENCE)


def rank_prefix() -> str:
    """Returns `rank N: ` in a process that a launcher started."""
    return f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""


def report_once(error: InputError) -> None:
    """Prints, on rank 0, an error that every rank may have. Another rank prints it if nobody stops it meanwhile."""
    prefix = ""
    if os.environ.get("RANK", "0") != "0":
        wait_for_the_end()
        prefix = rank_prefix()
    report(error, prefix)


def report(error: DistquantError | str, prefix: str = "") -> None:
    """Prints an error, or leaves that to the process that has started this rank.

    Ranks share a terminal, and rank 0 draws over its last lines as long as it loads.
    """
    if OUTCOME in os.environ and is_launched():
        problems = [dataclasses.astuple(problem) for problem in getattr(error, "problems", ())]
        with open(f"{os.environ[OUTCOME]}.{int(os.environ['RANK']):06}", "w") as file:
            json.dump({"prefix": prefix, "problems": problems, "text": str(error)}, file)
        return
    if is_launched() and os.environ["RANK"] != "0" and sys.stderr.isatty():
        time.sleep(LAST_DRAWING)
    terminal.show_error(error, prefix)


def _show_errors_of_ranks(path: str) -> None:
    """Prints the errors that ranks have left beside the file of the outcome."""
    for name in sorted(glob.glob(f"{glob.escape(path)}.*")):
        with open(name) as file:
            left = json.load(file)
        problems = [Problem(*problem) for problem in left["problems"]]
        terminal.show_error(InputError(problems) if problems else left["text"], left["prefix"])
