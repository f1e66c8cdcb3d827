"""One function for each command: `run_<command>(arguments, argv)` returns the exit code."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext

from distquant.api import plan as make
from distquant.cli import launch, render, terminal
from distquant.cli.page import plan_html
from distquant.cli.ranks import Handled
from distquant.errors import CheckFailed, InputError, Problems
from distquant.files import TEXT_BYTES, read_text
from distquant.loading.report import report_text
from distquant.outputs import output_problem, write_output
from distquant.progress import first_rank, working
from distquant.runtime.query import Outcome, Query
from distquant.tables import printable, printable_lines, without_controls


def run_plan(arguments: argparse.Namespace, argv: list[str]) -> int:
    _check_outputs(("--json", arguments.json), ("--html", arguments.html))
    with working("planning"):
        plan = make(arguments.model, **launch.load_options(arguments, arguments.mesh))
    if arguments.json is not None:
        write_output("--json", arguments.json, plan.to_json() + "\n")
    if arguments.html is not None:
        write_output("--html", arguments.html, plan_html(plan))
    print(printable_lines(str(plan)))
    return 0


def run_load(arguments: argparse.Namespace, argv: list[str]) -> int:
    _check_outputs(("--report", arguments.report))
    limit = {} if arguments.max_new_tokens is None else {"max_new_tokens": arguments.max_new_tokens}
    query = Query(prompt=arguments.prompt, raw=arguments.raw, generate=limit)
    outcome = _run(arguments, argv, query, arguments.mesh)
    if isinstance(outcome, int):
        return outcome
    if arguments.report is not None:
        write_output("--report", arguments.report, report_text(outcome.report))
    terminal.show(*render.report_parts(outcome.report, arguments.model, arguments.verbose))
    for note in outcome.notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    if outcome.answer is not None:
        print(without_controls(f"\n{render.answer_text(outcome)}"))
    return 0


def run_chat(arguments: argparse.Namespace, argv: list[str]) -> int:
    from distquant.cli.chat import chat

    try:
        chat(arguments, argv)
    except Handled as handled:
        return handled.code
    return 0


def run_verify(arguments: argparse.Namespace, argv: list[str]) -> int:
    meshes = arguments.mesh or []
    if len(meshes) < 2:
        fault = "one mesh cannot be compared" if meshes else "no mesh is given"
        raise InputError.one("--mesh", fault, "Give --mesh twice or more, such as --mesh tp=1 --mesh tp=2")
    if launch.is_launched() and not launch.started_here():
        fault = f"verify starts the ranks of each mesh itself, and this is rank {os.environ['RANK']} of a launcher"
        raise InputError.one("verify", fault, "Run it without a launcher")
    fingerprints = {}
    rest = _without(argv, ("--mesh", "--dp", "--ep", "--tp"))
    for mesh in meshes:
        outcome = _run(arguments, [*rest, "--mesh", mesh, "--mesh", mesh], Query(), mesh)
        if isinstance(outcome, int):
            return outcome
        fingerprints[mesh] = outcome.report["fingerprint"]
        print(f"{fingerprints[mesh]}  {mesh} ({outcome.report['runtime']})")
    if len(set(fingerprints.values())) > 1:
        raise CheckFailed(f"the fingerprints differ: {fingerprints}")
    print("equal")
    return 0


def run_perplexity(arguments: argparse.Namespace, argv: list[str]) -> int:
    outcome = _run(arguments, argv, Query(text=_read_text(arguments.text), window=arguments.window), arguments.mesh)
    if isinstance(outcome, int):
        return outcome
    print(f"perplexity {outcome.perplexity:.4f}  fingerprint {outcome.report['fingerprint']}")
    return 0


def run_inspect(arguments: argparse.Namespace, argv: list[str]) -> int:
    from distquant.checkpoint import open_checkpoint

    with working("reading headers"):
        checkpoint = open_checkpoint(arguments.model, revision=arguments.revision, cache_dir=arguments.cache_dir)
    terminal.show(*render.inspect_parts(checkpoint))
    return 0


def run_doctor(arguments: argparse.Namespace, argv: list[str]) -> int:
    from distquant.cli.doctor import doctor_parts

    with working("importing torch and looking at devices"):
        parts = doctor_parts(arguments.quant)
    terminal.show(*parts)
    return 0


def run_demo(arguments: argparse.Namespace, argv: list[str]) -> int:
    from distquant.cli.demo import demo

    demo(arguments)
    return 0


def _run(arguments: argparse.Namespace, argv: list[str], query: Query, mesh: str | None) -> Outcome | int:
    """Returns the outcome, or the exit code where another process reports it."""
    try:
        with working("planning") if first_rank() else nullcontext():
            outcome = launch.run(arguments, argv, query, mesh)
    except Handled as handled:
        return handled.code
    return 0 if outcome is None else outcome


def _without(argv: list[str], options: tuple[str, ...]) -> list[str]:
    """Returns the arguments without some options and their values."""
    kept, skip = [], False
    for argument in argv:
        if skip:
            skip = False
        elif argument in options:
            skip = True
        elif argument.partition("=")[0] not in options:
            kept.append(argument)
    return kept


def _check_outputs(*given: tuple[str, str | None]) -> None:
    """Raises `InputError` if files could not be written at the end, before the work is done in vain.

    Args:
        given: options and their paths.
    """
    problems = Problems()
    for option, path in given:
        if path is not None and (problem := output_problem(option, path)) is not None:
            problems.extend([problem])
    problems.raise_if_any()


def _read_text(path: str) -> str:
    try:
        return read_text(path, TEXT_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError.one("--text", f"{path} cannot be read ({reason})", "Give a UTF-8 text file") from error
