#!/usr/bin/env bash
# The first minutes on a GPU: eight at most, one table. See first_light.py.
#
#   tests/gpu/first_light.sh [--out FOLDER] [--seconds 480] [--gigabytes 8]
#   tests/gpu/first_light.sh --dry-run     # on the simulated device: needs a C++ compiler and no GPU
#
# PYTHON names the interpreter (default: python3). It needs torch, triton, transformers and accelerate. Whatever else is
# missing is named in the table.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" tests/gpu/first_light.py "$@"
