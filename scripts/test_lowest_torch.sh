#!/usr/bin/env bash
# Runs the whole suite against the lowest supported torch, in an environment of its own (not part of CI: it downloads a lot).
set -euo pipefail
cd "$(dirname "$0")/.."
torch=$(sed -n 's/^ *"torch>=\(.*\)",$/\1/p' pyproject.toml)
torchvision=$(sed -n 's/^ *"torchvision>=\(.*\)",$/\1/p' pyproject.toml)
environment=.venv-torch-$torch
if [ ! -e "$environment/installed" ]; then
    "${PYTHON:-python3}" -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet "torch==$torch.*" "torchvision==$torchvision.*" --editable '.[dev]'
    touch "$environment/installed"
fi
exec "$environment/bin/python" -m pytest --numprocesses=2 --dist=worksteal "$@"
