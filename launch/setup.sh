#!/usr/bin/env bash
# Make the environment .venv and install largebatch into it, in editable mode:
#
#   launch/setup.sh [EXTRAS]      for example: launch/setup.sh dev
#
# PYTHON       the Python that .venv is made with (default python3; 3.11 or newer)
# CONSTRAINTS  pip constraints file (default: launch/constraints-cpu.txt where there is no NVIDIA
#              GPU, none where there is one); empty: none
#
# `make` calls it, and again only when pyproject.toml or one of these files changed: what it leaves
# behind for that is .venv/.ready and .venv/.ready-EXTRAS.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${1:-}
python=${PYTHON:-python3}
cpu_index=https://download.pytorch.org/whl/cpu # PyTorch's own index of builds without CUDA

fail() {
    echo "setup: $*" >&2
    exit 1
}

is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'
}

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    cure="name one with make PYTHON=/path/to/python3 ..."
    command -v "$python" >/dev/null || fail "no $python here; largebatch needs Python 3.11+: $cure"
    is_recent "$python" || fail "$python is $("$python" -V 2>&1); largebatch needs Python 3.11+: $cure"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python has no venv module; install it (Debian, Ubuntu: apt install python3-venv)"
    "$python" -m venv .venv
fi
is_recent .venv/bin/python || fail ".venv holds $(.venv/bin/python -V); remove it and try again"

install() { # quietly, but for errors
    .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check --no-input "$@"
}

if nvidia-smi >/dev/null 2>&1; then
    build="torch for CUDA"
    constraints=${CONSTRAINTS-}
    index=
else
    build="torch for CPU"
    constraints=${CONSTRAINTS-launch/constraints-cpu.txt}
    index=$(.venv/bin/python - "$cpu_index/torch/" <<'PROBE'
import sys
import urllib.request

try:
    urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"), timeout=3)
except Exception:  # no network, a proxy, a certificate: pip's own index it is
    sys.exit()
print("yes")
PROBE
    )
fi
target=".${extras:+[$extras]}"
echo "setup: installing $build and largebatch${extras:+ with extras $extras} into .venv" \
    "(a few minutes the first time)"
# torch comes first and alone, so that nothing else of what we need is taken from its index.
if [ -z "$index" ] || ! install ${constraints:+-c "$constraints"} --index-url "$cpu_index" torch; then
    install ${constraints:+-c "$constraints"} torch
fi
install ${constraints:+-c "$constraints"} -e "$target"

touch .venv/.ready ${extras:+".venv/.ready-$extras"}
echo "setup: ready after $SECONDS s ($(.venv/bin/python --version), torch $(
    .venv/bin/python -c 'from importlib.metadata import version; print(version("torch"))'
))"
