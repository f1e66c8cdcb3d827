"""Loads a model onto Ray workers, answers a prompt, and prints the report and the fingerprint.

    python launchers/ray_job.py                                         starts Ray on this machine
    RAY_ADDRESS=auto python launchers/ray_job.py MODEL --mesh tp=8      joins the cluster that runs here
    ray job submit --working-dir . -- python launchers/ray_job.py MODEL --mesh tp=8

Workers ask for one CPU each, and for one GPU each if the cluster has any. MODEL must be readable at the same path on
every node. `ray job submit` needs `pip install "ray[default]"`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import distquant as dq
from distquant.cli.render import report_text

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "models" / "kjv-tiny"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="A load on Ray workers.")
    parser.add_argument("model", nargs="?", default=str(EXAMPLE), help="folder of a checkpoint, or a cached id")
    parser.add_argument("--quant", default="nf4-dq", help="short name or JSON file; 'checkpoint' takes its own")
    parser.add_argument("--mesh", default="tp=2")
    parser.add_argument("--prompt", default="In the beginning")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    return parser


def main() -> None:
    arguments = parser().parse_args()
    quant = None if arguments.quant == "checkpoint" else arguments.quant
    with dq.ray.load(arguments.model, quantization_config=quant, mesh=arguments.mesh) as sharded:
        print(sharded.generate(arguments.prompt, max_new_tokens=arguments.max_new_tokens, do_sample=False))
        report = sharded.report()
    print(f"\n{report_text(report)}")


if __name__ == "__main__":
    main()
