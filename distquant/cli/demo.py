"""The main job from end to end: plan, load onto Ray workers, answer, measure, and compare the bits."""

from __future__ import annotations

import argparse
from pathlib import Path

from distquant.api import fingerprint, load, plan
from distquant.cli import launch, render, terminal
from distquant.errors import CheckFailed, InputError
from distquant.files import TEXT_BYTES, read_text
from distquant.sharding.mesh import Mesh
from distquant.tables import table, without_controls


def demo(arguments: argparse.Namespace) -> None:
    """Runs the demo; raises `CheckFailed` if the sharded bits differ from the unsharded ones."""
    from distquant.runtime import ray
    from distquant.runtime.tokens import read_tokenizer
    from distquant.verification.perplexity import perplexity

    quant = arguments.quantization_config = arguments.quantization_config or "nf4-dq"
    options = launch.load_options(arguments, arguments.mesh)
    print(f"== the plan: {quant} at {arguments.mesh}\n")
    print(plan(arguments.model, **options))

    print(f"\n== loading onto {Mesh.parse(arguments.mesh).size} Ray workers\n", flush=True)
    text = _validation(arguments.model)
    sharded = ray.load(arguments.model, **options, progress=True)
    with sharded:
        report = sharded.report()
        terminal.show(*render.report_parts(report, arguments.model, verbose=True))
        print(f"\n== {arguments.prompt!r} goes on\n", flush=True)
        answer = sharded.generate(arguments.prompt, max_new_tokens=arguments.max_new_tokens, do_sample=False)
        print(without_controls(answer))
        quantized = sharded.perplexity(text) if text else None

    print("\n== the same model on one device\n", flush=True)
    unsharded = load(arguments.model, **{**options, "mesh": None})
    reference = fingerprint(unsharded)
    if text:
        unquantized = load(arguments.model, **{**options, "mesh": None, "quantization_config": "none"})
        tokenizer = read_tokenizer(arguments.model, arguments.trust_remote_code)
        baseline = perplexity(unquantized, tokenizer, text)
        rows = [(str(unquantized.dtype).removeprefix("torch."), "tp=1", f"{baseline:.3f}")]
        rows += [(quant, arguments.mesh, f"{quantized:.3f}")]
        terminal.show(table(("weights", "mesh", "perplexity on validation.txt"), rows))
    print(f"\nfingerprint at tp=1  {reference}")
    print(f"fingerprint at {arguments.mesh}  {report['fingerprint']}")
    if report["fingerprint"] != reference:
        raise CheckFailed(f"the fingerprints differ: {reference} and {report['fingerprint']}")
    print("equal: the sharded model has the same bits")


def _validation(model: str) -> str | None:
    path = Path(model) / "validation.txt"
    if not path.exists():
        return None
    try:
        return read_text(path, TEXT_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError.one(str(path), f"cannot be read ({reason})", "Put a UTF-8 text there, or remove it") from error
