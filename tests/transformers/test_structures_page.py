"""The page of structures says what the code does."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from hf_structures import PROMPT, STRUCTURES, tokens

from agnostic_cache import wrap

PAGE = Path(__file__).parents[2] / "docs" / "structures.md"


class Row(NamedTuple):
    roles: str
    cut: str
    copied: str


def rows() -> dict[str, Row]:
    text = PAGE.read_text("utf-8").partition("## JAX")[0]
    cells = [re.split(r"\s*\|\s*", line)[1:-1] for line in text.splitlines() if line.startswith("| ")]
    return {name.strip("`"): Row(*rest) for _, name, *rest in cells if name.startswith("`")}


def test_every_structure_has_a_row() -> None:
    assert list(rows()) == list(STRUCTURES)


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_row_is_true(name: str) -> None:
    structure, row = STRUCTURES[name](), rows()[name]
    leaves = wrap(structure.prefill(tokens(PROMPT))).leaves.values()
    roles = {getattr(leaf.role, "name", type(leaf.role).__name__) for leaf in leaves}
    assert set(re.findall("TOKENS|WINDOW|SNAPSHOT|LENGTH", row.roles)) == roles
    assert (row.cut == "any") is (structure.reach == PROMPT)
    assert (row.copied == "nothing") is structure.shared
    assert (row.copied == "the snapshots") is (any(leaf.frozen for leaf in leaves) and not structure.shared)
