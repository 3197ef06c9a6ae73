#!/usr/bin/env bash
# Run the whole method on a real model, in minutes on two cores, without a network (after the first run).
# With --small, or where the package index lacks the model, a small one is trained and used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh

# Waiting threads must not spin: with other busy programs on two cores, spinning made training six times slower.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
# Nothing here comes from a hub; without this, libraries may check there for new versions of a model.
export HF_HUB_OFFLINE=1
.venv/bin/python -m scripts.demo.demo "$@"
