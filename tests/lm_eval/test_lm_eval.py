"""lm-eval on a model that keeps its prompts: the metrics of its own ``hf`` model, of fewer tokens that are computed."""

# lm-eval is not installed where types are checked.
# pyright: reportMissingImports=false

from typing import Any

import pytest
from byte_model import byte_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from sums_task import sums

from agnostic_cache_adapters.transformers.lm_eval import CachedHFLM

ROOM = 1024


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    model, tokenizer = byte_model(ROOM)
    return {"pretrained": model, "tokenizer": tokenizer}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return sums(tmp_path_factory.mktemp("sums"), questions=12)


class Counted:
    """Counts the tokens that a model computes."""

    def __init__(self, model: Any) -> None:
        self.tokens = 0
        self.hook = model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, _module: object, given: Any, _out: object) -> None:
        self.tokens += given[0].numel()


def evaluate(model: HFLM, tasks: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return the metrics, the answers behind them, and how many tokens were computed for them."""
    counted = Counted(model.model)
    manager = TaskManager(include_defaults=False)  # else it reads thousands of files
    found = simple_evaluate(model=model, tasks=tasks, task_manager=manager, log_samples=True, bootstrap_iters=0)
    counted.hook.remove()
    assert found is not None
    answers = {
        name: [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in found["samples"].items()
    }
    return found["results"], answers, counted.tokens


@pytest.mark.parametrize("settings", [{}, {"max_length": 150}], ids=str)
def test_the_metrics_are_those_of_hf(
    parts: dict[str, Any], tasks: list[dict[str, Any]], settings: dict[str, Any]
) -> None:
    theirs, expected, all_tokens = evaluate(HFLM(**parts, **settings), tasks)
    model = CachedHFLM(**parts, **settings, prefix_cache="64MiB")
    ours, answers, tokens = evaluate(model, tasks)
    assert ours == theirs
    assert answers["say"] == expected["say"]
    assert close(answers["choose"], expected["choose"])
    if not settings:
        assert tokens < all_tokens / 3
        assert model.prefix_cache.stats().hit_tokens > 0
    assert model.prefix_cache.stats().bypassed == 0


def close(found: Any, expected: Any) -> bool:
    return all(
        one[1] == other[1] and one[0] == pytest.approx(other[0], abs=1e-3)
        for ones, others in zip(found, expected, strict=True)
        for one, other in zip(ones, others, strict=True)
    )
