"""``agnostic-cache inspect`` and ``doctor``, as a user runs them."""

from pathlib import Path

import pytest
from redis_server import Server
from typer.testing import CliRunner, Result

from agnostic_cache import open_storage
from agnostic_cache.cli.app import app
from agnostic_cache.storage.file import FileStorage


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, list(arguments))


@pytest.fixture
def url(tmp_path: Path) -> str:
    with FileStorage(tmp_path) as storage:
        for key in ("prompt/1", "prompt/2", "other", "esc\x1b[31m[bold]"):
            storage.put(key, key.encode() * 1000)
    return f"file://{tmp_path}"


def test_entries_are_listed_with_size_and_age(url: str) -> None:
    done = run("inspect", url)
    assert done.exit_code == 0
    assert all(text in done.output for text in ("prompt/1", "prompt/2", "other", "8.", "kB", " s", "4 entries"))
    assert "\x1b" not in done.output
    assert r"esc\x1b[31m[bold]" in done.output  # a key is shown, never obeyed


def test_damaged_entries_are_found(url: str, tmp_path: Path) -> None:
    assert run("inspect", url, "--verify").exit_code == 0
    path = max(tmp_path.glob("*.kv"))
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    assert run("inspect", url).exit_code == 0  # nothing is read
    done = run("inspect", url, "--verify")
    assert done.exit_code == 1
    assert "1 damaged" in done.output
    assert run("inspect", url, "--verify").exit_code == 0
    assert len(list(tmp_path.glob("*.damaged"))) == 1


def test_entries_are_removed(url: str) -> None:
    assert run("inspect", url, "--match", "prompt/*", "--remove").exit_code == 0
    with open_storage(url) as storage:
        assert sorted(storage.list_keys()) == ["esc\x1b[31m[bold]", "other"]


def test_a_server(server: Server) -> None:
    place = f"{server.url}?timeout=20&prefix=inspected"
    with open_storage(place) as storage:
        storage.put("here", bytes(3_000_000))
    done = run("inspect", place, "--verify")
    assert done.exit_code == 0
    assert "here" in done.output
    assert "3.0 MB" in done.output
    assert "whole" in done.output


@pytest.mark.parametrize("url", ["nothing://", "redis://127.0.0.1:1", "file:///proc/nowhere", "redis://a?nonsense=1"])
def test_what_cannot_be_used_is_one_line(url: str) -> None:
    done = run("inspect", url)
    assert done.exit_code == 2
    assert "Traceback" not in done.output


def test_a_directory_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    done = run("inspect", f"file://{tmp_path}/typo")
    assert done.exit_code == 2
    assert f"no directory {tmp_path}/typo" in done.output
    assert not list(tmp_path.iterdir())


def test_doctor_tells_what_works_and_how_to_get_the_rest() -> None:
    done = run("doctor")
    assert done.exit_code == 0
    assert "adapter host" in done.output
    for name in ("torch", "jax", "flax", "transformers", "redis", "zstd", "xxhash"):
        assert name in done.output
    for line in done.output.splitlines():
        assert "not installed" not in line or "pip install 'agnostic-cache[" in line
