"""Windows in the config of a model: lengths from which on it computes otherwise, and a copy whose windows are small."""

import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

_CUTS: Final = re.compile(r"(\w*_)?window(_size)?|attention_chunk_size")
_NAMES: Final = re.compile(rf"{_CUTS.pattern}|(mamba_)?chunk_size")


class Window(NamedTuple):
    """A setting of a config.

    Attributes:
        config: The config that holds it.
        name: Its name there.
        value: Its tokens.
        cuts: Whether tokens beyond it are out of sight; where not, it says how a state is computed.
    """

    config: Any
    name: str
    value: int
    cuts: bool


def of(config: Any, at_least: int) -> list[Window]:
    """Return the windows of a config and of its text config that are as long as `at_least`, or longer."""
    text = config.get_text_config(decoder=True)
    return [
        Window(each, name, value, _CUTS.fullmatch(name) is not None)
        for each in ([config] if text is config else [config, text])
        for name, value in vars(each).items()
        if type(value) is int and value >= at_least and _NAMES.fullmatch(name)
    ]


def shrink(copied: Any, windows: Sequence[Window], tokens: int) -> None:
    """Set windows of a model's copy to `tokens`: in its configs, and in each module that has noted one of them."""
    values = {window.value for window in windows}
    for config, name, _, _ in windows:
        setattr(config, name, tokens)
    for module in copied.modules():
        held = vars(module)
        noted = [name for name, value in held.items() if type(value) is int and value in values]
        held.update((name, tokens) for name in noted if _NAMES.fullmatch(name))
