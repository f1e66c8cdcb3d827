"""A load in a fresh process prints nothing of other libraries, and hides nothing else of them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from distquant.quiet import PREFIXES, quiet_imports

CODE = """
import sys, distquant
model = distquant.load(sys.argv[1], quantization_config=sys.argv[2])
print(distquant.fingerprint(model))
"""


@pytest.mark.parametrize("quant", ["nf4-dq"])
def test_a_load_prints_nothing(kjv_tiny: str, quant: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, kjv_tiny, quant],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.stderr == ""
    assert len(done.stdout.split()) == 1, "the fingerprint alone"


@pytest.mark.parametrize("name", PREFIXES)
def test_other_messages_are_still_logged(name: str, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        quiet_imports()
    logger = logging.getLogger(name)
    caplog.set_level(logging.WARNING, logger=name)  # a test before may have made it quieter
    logger.warning("%sthis and that", PREFIXES[name])
    logger.warning("out of memory")
    assert [record.getMessage() for record in caplog.records] == ["out of memory"]
    assert len({id(each) for each in logger.filters}) == len(logger.filters)
