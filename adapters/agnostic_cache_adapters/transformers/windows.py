"""Windows in the config of a model: lengths from which on it computes otherwise; and a copy with other windows."""

import enum
import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple


class Acts(enum.Enum):
    """What a model does with tokens beyond a window."""

    CUTS = re.compile(r"((?!keep_)\w*_)?window(_size)?|attention_chunk_size")
    """It does not see them."""
    SELECTS = re.compile(r"keep_window_size|index_topk")
    """It sees those that score highest."""
    CARRIES = re.compile(r"(mamba_)?chunk_size")
    """It sees them through a state."""


class Window(NamedTuple):
    """A setting of a config.

    Attributes:
        config: The config that holds it.
        name: Its name there.
        value: Its tokens.
        acts: What it does.
    """

    config: Any
    name: str
    value: int
    acts: Acts


_LARGEST: Final = 1 << 30  # what stands for no window in some configs is larger


def of(config: Any, at_least: int = 1) -> list[Window]:
    """Return the windows of a config and of its text config, of `at_least` so many tokens."""
    text = config.get_text_config(decoder=True)
    return [
        Window(each, name, value, acts)
        for each in ([config] if text is config else [config, text])
        for name, value in vars(each).items()
        if type(value) is int and at_least <= value < _LARGEST
        for acts in Acts
        if acts.value.fullmatch(name)
    ]


def selected(config: Any) -> int | None:
    """Return the tokens of which a model sees all; None where it never selects."""
    return min((each.value for each in of(config) if each.acts is Acts.SELECTS), default=None)


def resize(copied: Any, found: Sequence[Window], tokens: int) -> None:
    """Set windows of a model's copy to `tokens`, in its configs, and in each module that has noted one of them."""
    values = {(acts, value) for _, _, value, acts in found}
    for config, name, _, _ in found:
        setattr(config, name, tokens)
    for module in copied.modules():
        held = vars(module)
        numbers = [(name, value) for name, value in held.items() if type(value) is int]
        held.update((name, tokens) for name, value in numbers if any(_is(name, value, each) for each in values))


def _is(name: str, value: int, window: tuple[Acts, int]) -> bool:
    acts, tokens = window
    return value == tokens and acts.value.fullmatch(name) is not None
