"""What the tests of two frameworks together share: one model, whose weights both run."""

from typing import Any

import pytest
import torch
from hf_structures import SIZES
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="package")
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
