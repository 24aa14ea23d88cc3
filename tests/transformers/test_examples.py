"""The Hugging Face example of the README runs, and its answers do not depend on the cache."""

import runpy
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "hf_backend.py"


def test_readme_shows_the_example_that_is_tested() -> None:
    assert EXAMPLE.read_text("utf-8") in (EXAMPLE.parents[2] / "README.md").read_text("utf-8")


class Bytes:
    """A tokenizer of one token per character."""

    def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        assert return_tensors == "pt"
        ids = torch.tensor([[ord(character) % 64 for character in text]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, ids: torch.Tensor) -> str:
        return " ".join(map(str, ids.tolist()))


def test_a_document_is_computed_once_and_answers_are_the_same() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8
    )
    model: Any = LlamaForCausalLM(config).eval()
    backend = runpy.run_path(str(EXAMPLE))["Backend"](model, Bytes())
    document = "It was a bright cold day in April, and the clocks were striking thirteen. "
    for question in ("Who struck?", "When?", "Which day?", "Who struck?"):
        inputs = Bytes()(document + question, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        expected = Bytes().decode(out[0, inputs["input_ids"].shape[1] :])
        assert backend.answer(document + question, max_new_tokens=8) == expected
    assert backend.cache.stats().hit_tokens >= 3 * len(document)
