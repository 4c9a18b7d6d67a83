#!/usr/bin/env bash
# Train through the deepspeed launcher, on all GPUs of this machine or on those of a hostfile:
#
#   launch/deepspeed.sh strategy=deepspeed strategy.zero_stage=3 experiment=quickstart
#   HOSTFILE=hosts launch/deepspeed.sh ...     one line per machine: NAME slots=NUMBER_OF_GPUS
#
# NPROC_PER_NODE  processes on this machine (default: one per GPU, one where there is none)
# HOSTFILE        machines, which this one reaches by ssh without a password (default: this one)
# MASTER_PORT     free port on the first machine (default 29500)
# PYTHON          default: .venv/bin/python of this checkout, else python3
#
# The run folder must be on a disk that all machines share. Any strategy can be trained so.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || python=python3

place=(--master_port "${MASTER_PORT:-29500}")
if [ -n "${HOSTFILE:-}" ]; then
    place+=(--hostfile "$HOSTFILE")
elif [ -n "${NPROC_PER_NODE:-}" ]; then
    place+=(--num_gpus "$NPROC_PER_NODE")
elif ! nvidia-smi -L >/dev/null 2>&1; then
    place+=(--num_gpus 1)
fi
if ! nvidia-smi -L >/dev/null 2>&1; then
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m deepspeed.launcher.runner "${place[@]}" --module largebatch train "$@"
