"""A fleet: what a PyTorch process stored, a JAX process resumes, and the reverse, through a disk and through Redis."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from redis_server import Server

SUBJECTS = Path(__file__).parents[1] / "subjects"
DOCUMENT = list(range(3, 43))  # five blocks
NEW = 6


@pytest.fixture(scope="module")
def weights(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()), "utf-8")
    np.savez(folder / "weights.npz", **{name: tensor.numpy() for name, tensor in model.state_dict().items()})
    return folder


class Worker:
    """A process that answers in one framework."""

    def __init__(self, framework: str, weights: Path, urls: list[str]) -> None:
        command = [sys.executable, str(SUBJECTS / "prefix_process.py"), framework, str(weights), *urls]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, number: int, tokens: list[int]) -> tuple[list[int], int]:
        """Return the answer, and how many tokens of the prompt came from the storage of that number."""
        wants, says = self.process.stdin, self.process.stdout
        assert wants is not None
        assert says is not None
        wants.write(json.dumps([number, tokens]) + "\n")
        wants.flush()
        answer, hit = json.loads(says.readline())
        return answer, hit


@pytest.fixture(scope="module")
def workers(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Worker]]:
    """Two processes over the same two storages: a directory, and a Redis."""
    with Server(tmp_path_factory.mktemp("redis")) as server:
        urls = [f"file://{tmp_path_factory.mktemp('kv')}", f"{server.url}?timeout=10"]
        started = {framework: Worker(framework, weights, urls) for framework in ("torch", "jax")}
        yield started
        for worker in started.values():
            _, _ = worker.process.communicate(timeout=60)  # closes what it reads: it ends
            assert worker.process.returncode == 0


def plain(model: Any, tokens: list[int]) -> list[int]:
    out = model.generate(torch.tensor([tokens]), max_new_tokens=NEW, do_sample=False)
    return list(out[0, len(tokens) :].tolist())


@pytest.mark.parametrize("first", ["torch", "jax"])
@pytest.mark.parametrize("number", [0, 1], ids=["file", "redis"])
def test_a_process_goes_on_from_what_one_of_the_other_framework_stored(
    first: str, number: int, model: Any, workers: dict[str, Worker]
) -> None:
    one, other = workers[first], workers[{"torch": "jax", "jax": "torch"}[first]]
    document = [len(first), *DOCUMENT[1:]]  # one for each test
    asked = [*document, 50, 51]
    assert one.ask(number, asked) == (plain(model, asked), 0)
    for question in ([52, 53], [54, 55, 56, 57, 58, 59, 60, 61, 62]):
        tokens = [*document, *question]
        assert other.ask(number, tokens) == (plain(model, tokens), len(document))
    tokens = [*document, 54, 55, 56, 57, 58, 59, 60, 61, 1, 2, 3]  # a block that only the other one has seen
    assert one.ask(number, tokens) == (plain(model, tokens), len(document) + 8)
