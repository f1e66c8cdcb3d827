"""Runs a query in the chosen runtime. Ranks of torchrun are started here unless a launcher has started them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from distquant.cli import ranks, terminal
from distquant.cli.flags import read_flags
from distquant.cli.ranks import STARTED_HERE
from distquant.environment import is_rank, rank_threads
from distquant.errors import DistquantError, InputError, Problem, Problems, RankError, SilentRankError
from distquant.left_behind import temporary_folder
from distquant.options import PlanOptions, RunOptions
from distquant.outputs import write_output
from distquant.planning.validation import check_supported
from distquant.progress import give_back, handed_over, status
from distquant.runtime.measure import check_rank_count
from distquant.runtime.query import Outcome, Query, perform
from distquant.sharding.mesh import Mesh

if TYPE_CHECKING:
    from distquant.runtime.ray_model import Sharded

OUTCOME = "DISTQUANT_OUTCOME"
"""Environment variable: the file that rank 0 writes the outcome to, if the command line has started the ranks."""

TALK = "DISTQUANT_TALK"
"""Environment variable: the socket at which rank 0 finds the command line that has started the ranks for a chat."""

PATIENCE = 30.0
"""Seconds that a rank waits for another to report the error, and for the launcher to stop this one.

Ranks that share few cores meet the same error many seconds apart.
"""


LAST_DRAWING = 1.0
"""Seconds after which rank 0 has learned of another rank's failure, and draws no more."""


def run(arguments: argparse.Namespace, argv: list[str], query: Query, mesh: str | None) -> Outcome | None:
    """Loads the model and runs the query; returns None on ranks whose outcome rank 0 prints."""
    runtime, size = choose(arguments, mesh, token_problems(arguments, query))
    if runtime == "ray":
        with on_ray(arguments, mesh) as sharded:
            status("computing the fingerprint")
            return sharded.perform(query)
    if runtime == "local":
        return perform(load_here(arguments, mesh, "local"), query, "local")
    if is_launched():
        return _as_rank(arguments, query, mesh)
    with temporary_folder() as folder:
        path = os.path.join(folder, "outcome.json")
        with handed_over(), started_ranks(arguments, argv, mesh, size, {OUTCOME: path}) as started:
            started.wait()
        with open(path) as file:
            return Outcome(**json.load(file))


def choose(arguments: argparse.Namespace, mesh: str | None, found: Iterable[Problem]) -> tuple[str, int]:
    """Returns the runtime, and the number of ranks.

    Args:
        arguments: of the command.
        mesh: its mesh.
        found: further problems; those of a rank that the command line has started are known already.

    Raises:
        InputError: with all problems, also those of the plan if there are any.
    """
    launched, size, problems = is_launched(), Mesh.parse(mesh).size, Problems()
    runtime = arguments.runtime or ("torchrun" if launched or size > 1 else "local")
    if not started_here():
        problems.extend(found)
    if problems:
        raise all_problems(problems, arguments, mesh)
    return runtime, size


def started_here() -> bool:
    """Returns True if the command line has started this process as a rank."""
    return STARTED_HERE in os.environ


def is_launched() -> bool:
    """Returns True if a launcher (torchrun, srun, ours) has started this process as a rank."""
    return is_rank()


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
    from distquant.runtime.tokens import check_vocabulary, encoded, has_template, template_inputs

    texts = [("--prompt", query.prompt, 1), ("--text", query.text and query.text[:1000], 2)]
    for option, text, least in texts:
        tokenizer = None if text is None else (yield from tokenizer_or_problems(arguments, option))
        if text is None or tokenizer is None:
            continue
        try:
            ids = encoded(tokenizer, text, option).input_ids
            if len(ids) < least:
                yield Problem(option, f"has {len(ids)} tokens, {least} are needed", "Give a longer text")
            elif option == "--prompt" and not query.raw and has_template(tokenizer):
                ids = template_inputs(tokenizer, [{"role": "user", "content": text}])["input_ids"]
            check_vocabulary(ids, _vocabulary(arguments), option)
        except InputError as error:
            yield from error.problems


def _vocabulary(arguments: argparse.Namespace) -> int | None:
    """Returns the entries of the vocabulary; None where config.json does not say, or planning reports it."""
    from distquant.checkpoint.faults import Faults
    from distquant.checkpoint.locate import locate
    from distquant.checkpoint.sidecar_configs import read_config
    from distquant.runtime.tokens import stored_vocabulary

    folder, _ = locate(arguments.model, arguments.revision, arguments.cache_dir)
    return stored_vocabulary(read_config(folder, Faults(""))) if folder.is_dir() else None


def tokenizer_or_problems(arguments: argparse.Namespace, option: str) -> Generator[Problem, None, Any]:
    """Yields why the model's tokenizer, which an option needs, cannot be read; returns it if it can."""
    from distquant.checkpoint.locate import locate
    from distquant.runtime.tokens import read_tokenizer

    try:
        folder, _ = locate(arguments.model, arguments.revision, arguments.cache_dir)
    except InputError:
        return None  # planning reports it
    try:
        return read_tokenizer(folder, arguments.trust_remote_code, option)
    except InputError as error:
        yield from error.problems
        return None


def load_options(arguments: argparse.Namespace, mesh: str | None) -> dict[str, Any]:
    """Returns the options of the plan that the command line gave, with this mesh."""
    return {**read_flags(arguments, PlanOptions), "mesh": mesh}


def load_here(arguments: argparse.Namespace, mesh: str | None, runtime: str) -> Any:
    """Loads the model in this process, or its part if this is a rank, and shows rank 0's progress."""
    import torch

    from distquant.api import load

    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if runtime == "torchrun" else 1
    torch.set_num_threads(arguments.threads or rank_threads(beside))
    return load(arguments.model, **load_options(arguments, mesh), **read_flags(arguments, RunOptions))


def _as_rank(arguments: argparse.Namespace, query: Query, mesh: str | None) -> Outcome | None:
    """Loads this rank's part and runs the query; the outcome is printed by one process, or None is returned."""
    with watched():
        model = load_here(arguments, mesh, "torchrun")
        outcome = perform(model, query, "torchrun")
        status("ending the ranks")
        leave()
    if os.environ["RANK"] != "0":
        return None
    if OUTCOME in os.environ:
        write_output("TMPDIR", os.environ[OUTCOME], json.dumps(outcome.to_dict()))
        give_back()
        return None
    return outcome


@contextmanager
def watched() -> Iterator[None]:
    """Watches for ranks that fall silent, from the load on until the end."""
    from distquant.runtime import collectives, heartbeat

    with heartbeat.kept(), collectives.silent_ranks_named():
        try:
            yield
        except SilentRankError as error:
            _wake(error.rank)
            raise


def _wake(rank: int) -> None:
    """Lets a silent rank go on if it is stopped: torchrun's SIGTERM would wait 30 s for it, and then kill it."""
    from distquant.runtime import heartbeat

    beats = heartbeat.current()
    if beats is not None and not started_here():
        beats.wake(rank)


def leave() -> None:
    """Ends this rank's process group when all ranks have come here."""
    import torch.distributed

    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@contextmanager
def on_ray(arguments: argparse.Namespace, mesh: str | None) -> Iterator[Sharded]:
    """Loads the model onto Ray workers, and ends them afterwards."""
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
        yield sharded


@contextmanager
def started_ranks(
    arguments: argparse.Namespace, argv: list[str], mesh: str | None, size: int, environment: dict[str, str]
) -> Iterator[ranks.Ranks]:
    """Starts ranks that run this command, after a plan that says that they can; ends them afterwards."""
    from distquant.api import plan

    check_supported(plan(arguments.model, **load_options(arguments, mesh)))
    check_rank_count(size)
    status(f"starting {size} ranks")
    threads = arguments.threads or rank_threads(size)
    own = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
    with temporary_folder() as folder:
        own[STARTED_HERE] = folder
        try:
            with ranks.started(argv, size, {**own, **environment}, arguments.timeout) as started:
                yield started
        except DistquantError:
            _show_errors_of_ranks(folder)
            raise


def lost_peer(error: RuntimeError) -> bool:
    """Returns True if a collective of this rank failed because another rank ended, which reports its own error."""
    if not is_launched() or "torch" not in sys.modules:
        return False
    from distquant.runtime.collectives import is_lost_peer

    return is_lost_peer(error)


def of_another_rank(error: DistquantError) -> bool:
    """Returns True if this process is a rank that stopped because another rank failed, which reports its own error.

    One that is silent cannot: the first of the others does.
    """
    if not is_launched() or not isinstance(error, RankError):
        return False
    own = int(os.environ["RANK"])
    if isinstance(error, SilentRankError):
        return own != (1 if error.rank == 0 else 0)
    return error.rank != own


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
    if started_here():
        problems = [dataclasses.astuple(problem) for problem in getattr(error, "problems", ())]
        left = json.dumps({"prefix": prefix, "problems": problems, "text": str(error)})
        try:
            write_output("TMPDIR", os.path.join(os.environ[STARTED_HERE], f"{int(os.environ['RANK']):06}.json"), left)
        except InputError:  # no room for it there: reported here, though others draw on the same terminal
            terminal.show_error(error, prefix)
        return
    if is_launched() and os.environ["RANK"] != "0" and sys.stderr.isatty():
        time.sleep(LAST_DRAWING)
    terminal.show_error(error, prefix)


def _show_errors_of_ranks(folder: str) -> None:
    """Prints the errors that ranks have left."""
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name)) as file:
            left = json.load(file)
        problems = [Problem(*problem) for problem in left["problems"]]
        terminal.show_error(InputError(problems) if problems else left["text"], left["prefix"])
