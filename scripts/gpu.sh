#!/usr/bin/env bash
# Check and measure every streamed pass on a GPU, at most eight minutes on one card: scripts/gpu.sh [--output TABLE.md]
# First results against the CPU on a tiny model, then seconds and peaks against promises on layers shaped as in an 8B
# model. Without a GPU, `scripts/gpu.sh --device pretend --tiny` runs the same steps on the tests' pretend device.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -x .venv/bin/python ]] || scripts/setup.sh
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}" HF_HUB_OFFLINE=1
export PYTHONPATH="$PWD/compiler:$PWD/runtime${PYTHONPATH:+:$PYTHONPATH}"
exec .venv/bin/python -W ignore -m scripts.gpu.check "$@"
