"""The journeys on a pretend accelerator, each file in a process of its own.

A process that has computed gradients cannot register another device, and one that has registered it offers it to all.
"""

import os
import sys
from pathlib import Path

import pytest

from helpers.children import fork_server, print_to
from helpers.places import ROOT


def run_tests(file: str, printed: Path) -> None:
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]
    # The fork server has imported packages with plugins that no test here needs, which pytest warns of.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    print_to(printed)
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "pytest_timeout", "--rootdir", str(ROOT), file]))


@pytest.mark.parametrize("name", ["pretend_commands", "pretend_costs", "pretend_promises"])
def test_on_a_pretend_device(tmp_path: Path, name: str) -> None:
    """A fresh process would first import for 10 s what the fork server has imported."""
    file = ROOT / "tests" / "journeys" / f"{name}.py"
    process = fork_server().Process(target=run_tests, args=(str(file), tmp_path / "printed"))
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "printed").read_text()
