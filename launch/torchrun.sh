#!/usr/bin/env bash
# Train on all GPUs of this machine (one process where there is none), or of several machines:
#
#   launch/torchrun.sh experiment=quickstart optim.lr=1e-3
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=first-machine launch/torchrun.sh ...     on the first machine
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=first-machine launch/torchrun.sh ...     on the second one
#
# NPROC_PER_NODE  processes on this machine (default: one per GPU)
# MASTER_PORT     free port on the first machine (default 29500)
# PYTHON          default: .venv/bin/python of this checkout, else python3
#
# The run folder must be on a disk that all machines share.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || python=python3
if nvidia-smi -L >/dev/null 2>&1; then ranks=gpu; else ranks=1; fi
ranks=${NPROC_PER_NODE:-$ranks}

if [ "${NNODES:-1}" = 1 ]; then
    place=(--standalone)
else
    : "${NODE_RANK:?"is not set; the machines are numbered from 0 to NNODES-1"}"
    : "${MASTER_ADDR:?"is not set; it is the address of machine 0"}"
    place=(
        --nnodes "$NNODES" --node-rank "$NODE_RANK"
        --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}"
    )
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun's default, without its warning
exec "$python" -m torch.distributed.run "${place[@]}" --nproc-per-node "$ranks" \
    -m largebatch train "$@"
