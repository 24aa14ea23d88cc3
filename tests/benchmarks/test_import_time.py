"""What ``import agnostic_cache`` costs over a bare interpreter, and what it loads."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import agnostic_cache

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.benchmarks.conftest import Race, Report

ROOT = Path(agnostic_cache.__path__[0]).parent
EVERYTHING = "from agnostic_cache import *"
LOADED = f"import sys; before = set(sys.modules); {EVERYTHING}; print(*set(sys.modules) - before)"


@pytest.fixture
def run(tmp_path: Path) -> Callable[[str], str]:
    """Run code in a new interpreter, which finds the package where this one found it."""
    # Bytecode is kept, as in an installation, and elsewhere, so that the sources stay as they are.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def run(code: str) -> str:
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout

    return run


def test_import_time(run: Callable[[str], str], race: Race, report: Report) -> None:
    assert "agnostic_cache" in run(LOADED).split()  # compiles
    lines = ("pass", "import agnostic_cache", "from agnostic_cache import StateCache", EVERYTHING)
    seconds = race({line: functools.partial(run, line) for line in lines}, rounds=25)
    for line, target in zip(lines[1:], (0.040, 0.040, None), strict=True):
        report(f"{line}, over bare", seconds[line] - seconds["pass"], None, target)


def test_import_loads_the_standard_library_only(run: Callable[[str], str]) -> None:
    loaded = {name.partition(".")[0] for name in run(LOADED).split()}
    assert loaded - sys.stdlib_module_names == {"agnostic_cache"}
