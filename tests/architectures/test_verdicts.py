"""With no table, the proof alone finds every type that is known to be wrong, and loses none of those that are right."""

from pathlib import Path
from typing import Any

import architectures
import pytest
import torch

from agnostic_cache_adapters.transformers.proof import Why
from agnostic_cache_adapters.transformers.verdicts import Verdicts, verdict_of

LOSE_A_STATE = ("jamba", "zamba", "recurrent_gemma", "mamba", "falcon_mamba", "moshi")
WRONG = {
    **dict.fromkeys(LOSE_A_STATE, (Why.PIECES,)),
    **dict.fromkeys(("prophetnet", "rwkv"), (Why.RAISES,)),
    **dict.fromkeys(("openai-gpt", "xlm", "xlnet", "reformer", "cpmant"), (Why.FUTURE, Why.RAISES, Why.NO_CACHE)),
}
COLUMNS = ("bart", "mbart", "blenderbot", "marian", "pegasus", "whisper", "trocr", "roformer", "git")
RIGHT = (
    *(
        "llama",
        "mistral",
        "mixtral",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_oss",
        "qwen2",
        "qwen3",
        "qwen3_next",
        "phi3",
    ),
    *("bloom", "deepseek_v3", "deepseek_v32", "granitemoehybrid", "falcon_h1", "mamba2", "bamba", "roberta", "zamba2"),
    *("nemotron_h", "llama4_text", "lfm2", "bert", "falcon", "opt", "olmo3", "doge"),
)


@pytest.fixture
def own(tmp_path: Path) -> Verdicts:
    return Verdicts({}, tmp_path)


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_types_are_found(own: Verdicts, kind: str) -> None:
    verdict = own.of(architectures.tiny(kind, "causal"))
    assert (verdict.prefix, verdict.rows) == (False, False)
    assert verdict.why in WRONG[kind]


@pytest.mark.parametrize("kind", LOSE_A_STATE)
def test_wrong_types_are_found_in_16_bits(own: Verdicts, kind: str) -> None:
    assert own.of(architectures.tiny(kind, "causal").to(torch.bfloat16)).why is Why.PIECES


@pytest.mark.parametrize("kind", COLUMNS)
def test_rows_of_types_without_positions_stay_where_they_are(own: Verdicts, kind: str) -> None:
    verdict = own.of(architectures.tiny(kind, "causal"))
    assert (verdict.prefix, verdict.rows, verdict.why) == (True, False, Why.ROWS)


@pytest.mark.parametrize("kind", RIGHT)
def test_right_types_pass(own: Verdicts, kind: str) -> None:
    verdict = own.of(architectures.tiny(kind, "causal"))
    assert (verdict.prefix, verdict.rows, verdict.reason) == (True, True, None)


def test_rows_of_an_unknown_kind_of_cache_stay_where_they_are(own: Verdicts) -> None:
    verdict = own.of(architectures.tiny("minimax", "causal"))
    assert (verdict.prefix, verdict.rows) == (True, False)


def test_a_prompt_that_is_read_in_both_directions_is_found(own: Verdicts) -> None:
    assert own.of(architectures.tiny("paligemma", "image-text")).why is Why.FUTURE
    marked = own.of(architectures.tiny("hrm_text", "causal"))
    assert (marked.prefix, marked.marked) == (True, False)


@pytest.mark.parametrize("kind", [*RIGHT, *COLUMNS, *WRONG])
def test_the_shipped_table_says_the_same(own: Verdicts, kind: str) -> None:
    model: Any = architectures.tiny(kind, "causal")
    shipped = verdict_of(model)
    proven = own.of(model)
    assert (shipped.source, proven.source) == ("table", "proof")
    assert (shipped.prefix, shipped.rows, shipped.marked, shipped.why) == (*proven[:2], proven.marked, proven.why)
