"""What the sessions install is pinned, and README.md and CONTRIBUTING.md say what that is."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCKS = sorted((ROOT / "locks").glob("*.txt"))
PIN = re.compile(r"([a-z0-9-]+)==([0-9][\w.]*)(?: ; .+)?")


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "locks" / f"{name}.txt").read_text("utf-8").splitlines()
    found = [PIN.fullmatch(line) for line in lines if not line.startswith("#")]
    return {match[1]: match[2] for match in found if match is not None}


def section(page: str, title: str) -> str:
    return (ROOT / page).read_text("utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_pins_every_package_to_one_release_and_names_no_place(lock: Path) -> None:
    lines = [line for line in lock.read_text("utf-8").splitlines() if not line.startswith("#")]
    assert lines
    assert [line for line in lines if PIN.fullmatch(line) is None] == []


def test_the_readme_names_the_versions_that_the_locks_pin() -> None:
    row = dict(re.findall(r"^\| (\w+) \| (.+) \|$", section("README.md", "Install"), re.MULTILINE))
    minimums, newest = pins("minimums-3.11"), {**pins("interop-3.11"), "jax": ""}
    assert row["torch"].startswith(f"{newest['torch']},")
    assert row["transformers"] == f"{minimums['transformers']} (lowest), {newest['transformers']}"
    assert row["flax"] == f"{minimums['flax']} (lowest), {newest['flax']}"
    jax = [pins(f"jax-3.{minor}")["jax"] for minor in (11, 12, 13)]
    assert jax[1] == jax[2]
    assert row["jax"] == f"{jax[0]} (Python 3.11), {jax[1]}"
    assert minimums["jax"] == jax[0]


def test_each_session_stands_in_one_tier() -> None:
    sessions = re.findall(r"^def (\w+)\(session: nox.Session\)", (ROOT / "noxfile.py").read_text("utf-8"), re.MULTILINE)
    table = re.findall(r"^\| `(\w+)`", section("CONTRIBUTING.md", "Set up"), re.MULTILINE)
    assert sorted(table) == sorted(set(sessions))
