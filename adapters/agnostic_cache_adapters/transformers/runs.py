"""Runs of a model's copy through ``generate``, prepared as a user's are; logits of every position."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from transformers import GenerationConfig

from agnostic_cache_adapters.transformers import release
from agnostic_cache_adapters.transformers.model_copy import wrap_call
from agnostic_cache_adapters.transformers.steps import prepared, tells_length

_SPECIAL: Final = re.compile(r"\w*(token|pad|bos|eos|sep|cls|mask|image|video|audio)\w*(_id|_index|_ids)")


class Runs:
    """What a copy computes, one call of ``generate`` each.

    Attributes:
        model: The copy.
    """

    def __init__(self, copied: Any) -> None:
        self.model = copied
        self._logits: list[torch.Tensor] = []
        copied.generation_config = _plain_config(copied.generation_config)
        wrap_call(copied, self._record)

    def _record(self, _: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("logits_to_keep", None)
            outputs = call(*args, **kwargs)
            self._logits.append(outputs.logits)
            return outputs

        return recorded

    def run(
        self, ids: torch.Tensor, cache: Any = None, start: int = 0, mask: torch.Tensor | None = None, **marks: Any
    ) -> tuple[torch.Tensor, Any]:
        """Compute `ids` from `start` on, as ``generate`` does; return their logits and the cache behind them."""
        self._logits.clear()
        given = {} if cache is None else release.generate_argument(self.model, cache)
        if not tells_length(cache):  # generate cannot tell what is new: its first step, then
            return self._logits_and_cache(self.model(**prepared(self.model, ids, cache, start)))
        settings = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
        mask = torch.ones_like(ids) if mask is None else mask
        return self._logits_and_cache(
            type(self.model).generate(self.model, input_ids=ids, attention_mask=mask, **settings, **given, **marks)
        )

    def _logits_and_cache(self, outputs: Any) -> tuple[torch.Tensor, Any]:
        return self._logits[0], release.cache_of(outputs)


def texts(model: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two prompts of random tokens, shape (1, count), of which none means anything special."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    vocabulary = min(vocabulary, getattr(model.get_input_embeddings(), "num_embeddings", vocabulary))
    special = set(_special(model.config.to_dict()))
    words = [token for token in range(vocabulary // 3, vocabulary) if token not in special][: vocabulary // 2]
    random = torch.Generator().manual_seed(3)
    chosen = torch.tensor(words)[torch.randint(len(words), (2, 1, count), generator=random)]
    one, other = chosen.to(model.device)
    return one, other


def _special(config: Mapping[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _special(value)
        elif _SPECIAL.fullmatch(str(name)):
            yield from (one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, int))


def _plain_config(config: Any) -> Any:
    """Return a generation config that decodes greedily, with what a class keeps there besides."""
    made = GenerationConfig(disable_compile=True)
    for name, value in vars(config).items():
        if name not in vars(made):
            setattr(made, name, copy.copy(value))
    return made
