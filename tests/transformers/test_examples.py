"""The Hugging Face example of the README runs, and its answers do not depend on the cache."""

import runpy
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "hf_backend.py"


def test_readme_shows_the_example_that_is_tested() -> None:
    assert EXAMPLE.read_text("utf-8") in (EXAMPLE.parents[2] / "README.md").read_text("utf-8")


def test_a_document_is_computed_once_and_answers_are_the_same() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8
    )
    model: Any = LlamaForCausalLM(config).eval()
    example = runpy.run_path(str(EXAMPLE))
    document, questions = list(range(3, 40)), [[50, 51], [52], [53, 54, 55], [50, 51]]
    for question in questions:
        prompt = torch.tensor([document + question])
        expected = model.generate(prompt, max_new_tokens=16, do_sample=False)[0, prompt.shape[1] :].tolist()
        assert example["answer"](model, document, question) == expected
    stats = example["cache"].stats()
    assert (stats.puts, stats.hits, stats.misses) == (1, len(questions) - 1, 1)
