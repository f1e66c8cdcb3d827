"""One rank of two that a launcher has started, with the simulated device: `launched.py LIBRARY MODEL`; prints JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(library: str, model: str) -> None:
    import simulated
    import torch.distributed as dist

    simulated.register(Path(library))
    import distquant as dq

    def loaded(**variables: str) -> list[str]:
        """What a load says, or the device and the fingerprint."""
        os.environ.update(variables)
        try:
            found = dq.load(model, quantization_config="nf4", mesh="dp=2", timeout=60.0)
        except dq.InputError as error:
            return [str(error)]
        finally:
            for name in variables:
                del os.environ[name]
        return [str(found.device), dq.fingerprint(found)]

    same = {"LOCAL_RANK": "0"}
    results = [loaded(**same), loaded(), loaded(SLURM_LOCALID=os.environ["OTHER"], SLURM_STEP_NUM_TASKS="2")]
    print(json.dumps([*results, loaded(**same, DISTQUANT_SHARE_DEVICES="1")]))
    dist.destroy_process_group()  # one that lives until the interpreter ends may abort the process


if __name__ == "__main__":
    main(*sys.argv[1:])
