#!/usr/bin/env bash
# The whole method on a small model, in minutes on two cores and without a network (after the first set-up).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh

# Threads that wait must not spin: next to other busy programs on two cores, spinning made training six times slower.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
# Nothing here comes from a hub; without this, libraries may look there for news of a model.
export HF_HUB_OFFLINE=1
.venv/bin/python -m scripts.demo.demo "$@"
