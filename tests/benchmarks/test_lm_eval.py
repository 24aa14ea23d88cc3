"""lm-eval on a real model: few-shot questions with a cache, against lm-eval's own ``hf`` model."""

# lm-eval is not installed where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from sums_task import SHOTS, sums

from agnostic_cache_adapters.transformers.lm_eval import CachedHFLM

if TYPE_CHECKING:
    from pathlib import Path

    from tests.benchmarks.conftest import Demo, Race, Report

QUESTIONS = 10


def test_few_shot_questions(demo: Demo, race: Race, report: Report, tmp_path: Path) -> None:
    choose = sums(tmp_path, QUESTIONS)[0]
    parts: dict[str, Any] = {"pretrained": demo.model, "tokenizer": demo.tokenizer}
    found: dict[str, Any] = {}
    manager = TaskManager(include_defaults=False)

    def evaluate(name: str, model: Any) -> None:
        results: Any = simple_evaluate(model=model, tasks=[choose], task_manager=manager, bootstrap_iters=0)
        found[name] = results["results"]

    contenders = {
        "ours": lambda: evaluate("ours", CachedHFLM(**parts)),  # an empty cache each time
        "peer": lambda: evaluate("peer", HFLM(**parts)),
    }
    seconds = race(contenders, rounds=3)
    assert found["ours"] == found["peer"]
    report(f"lm-eval, {QUESTIONS} questions, {SHOTS} shots, against hf", seconds["ours"], seconds["peer"], 1.0)
