#!/usr/bin/env bash
# Every check of the project: lint, format, types, tests. Arguments go to pytest, as in `scripts/test.sh -k correct`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh

# Waiting threads must not spin for long: with other busy programs on two cores that made training six times slower.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"
# No test may reach a hub: one that tries fails at once, and the same way on a machine with a network.
export HF_HUB_OFFLINE=1
python=.venv/bin/python

"$python" -m ruff check compiler runtime scripts tests
"$python" -m ruff format --check --quiet compiler runtime scripts tests
"$python" -m mypy
# Two processes: each test uses one core. `scripts/test.sh -n 0` runs them in one.
"$python" -m pytest -n 2 --dist worksteal "$@"
echo "test: all checks passed after $SECONDS s" >&2
