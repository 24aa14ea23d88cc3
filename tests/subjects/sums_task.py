"""A few-shot task for lm-eval on a data set made here: sums, to be chosen, said or read."""

import json
import random
from pathlib import Path
from typing import Any

SHOTS = 5


def sums(folder: Path, questions: int) -> list[dict[str, Any]]:
    """Return the task ``choose`` of four choices, ``say`` of answers in words and ``read`` of whole texts."""
    chance = random.Random(0)
    files = {}
    for split, count in (("train", 20), ("test", questions)):
        lines = []
        for _ in range(count):
            one, other = chance.randrange(50), chance.randrange(50)
            choices = [str(one + other + wrong) for wrong in (0, 1, -3, 10)]
            chance.shuffle(choices)
            right = choices.index(str(one + other))
            lines.append({"question": f"What is {one} plus {other}?", "choices": choices, "right": right})
        files[split] = str(folder / f"{split}.jsonl")
        Path(files[split]).write_text("\n".join(map(json.dumps, lines)), "utf-8")
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        "training_split": "train",
        "fewshot_split": "train",
        "test_split": "test",
        "num_fewshot": SHOTS,
        "fewshot_config": {"sampler": "first_n"},  # as MMLU: by default, each question gets examples of its own
        "doc_to_text": "Question: {{question}}\nAnswer:",
    }
    choose = {
        "task": "choose",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    say = {
        "task": "say",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[right]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    read = {
        "task": "read",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "num_fewshot": 0,
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    return [{**shared, **task} for task in (choose, say, read)]
