"""The one rule for errors of ours: a call of ``generate`` that would succeed without a cache succeeds.

What is raised inside the model's own call is not ours: it is not caught here.
"""

import contextlib
import logging
import traceback
from collections.abc import Iterator

import torch

from agnostic_cache.errors import CacheBypassWarning
from agnostic_cache.prefix import PrefixCache
from agnostic_cache_adapters.transformers.model_copy import generators

_log = logging.getLogger("agnostic_cache.transformers")


@contextlib.contextmanager
def attempt(cache: PrefixCache, what: str, device: torch.device) -> Iterator[None]:
    """Let an error in a ``with`` block become a bypass: one warning, a log record, and a count.

    Then what the block had loaded and computed is freed, and random numbers are as before it. A cache with
    ``strict=True`` lets the error through; an interrupt always comes through.

    Args:
        cache: Which cache is bypassed.
        what: What the block does, for the warning: ``"storing an answer"``.
        device: Where the model computes, and draws random numbers.
    """
    random = generators(device)
    before = [get() for get, _ in random]
    try:
        yield
    except CacheBypassWarning:  # whoever turns warnings into errors wants to have it
        raise
    except Exception as error:
        if cache.strict:
            raise
        _log.warning("%s failed; the call goes past the cache", what, exc_info=error)
        reason = f"{type(error).__name__} while {what}; the log has more"
        _free(error)
    else:
        return
    for state, (_, restore) in zip(before, random, strict=True):
        restore(state)
    cache.bypass(reason)


def _free(error: BaseException) -> None:
    """Drop what the frames of an error hold: a log record may keep the error for long, and memory may be what lacks."""
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    for each in chain:  # grows under way
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            traceback.clear_frames(each.__traceback__)
            chain += [each.__cause__, each.__context__]
