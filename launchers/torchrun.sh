#!/usr/bin/env bash
# Loads a model over the devices of this machine, one rank each, with torchrun.
#
#   launchers/torchrun.sh                                  the example model on 2 ranks
#   launchers/torchrun.sh MODEL [NPROC] [ARGUMENTS ...]    arguments go to `distquant load`
#   launchers/torchrun.sh my-model 8 --quant nf4-dq --prompt "Once upon a time" --report report.json
#
# Without GPUs the ranks are CPU processes. Several nodes: see slurm.sbatch.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -x $here/.venv/bin/torchrun ]]; then
    PATH=$here/.venv/bin:$PATH
fi
if [[ $# -eq 0 ]]; then
    set -- "$here/examples/models/kjv-tiny" 2 --quant nf4-dq --prompt "In the beginning"
fi
model=$1
ranks=${2:-2}
shift $(($# < 2 ? $# : 2))
# torchrun itself would take 1. This keeps OMP_NUM_THREADS where it is set, and counts only the cores that may be used.
OMP_NUM_THREADS=$(python -c "from distquant.environment import rank_threads; print(rank_threads($ranks))")
export OMP_NUM_THREADS

exec torchrun --standalone --nproc-per-node "$ranks" \
    -m distquant load "$model" --mesh "tp=$ranks" --runtime torchrun "$@"
