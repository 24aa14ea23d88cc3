"""What a `PrefixCache` says of itself."""

from typing import NamedTuple


class PrefixCacheStats(NamedTuple):
    """What a `PrefixCache` holds and did.

    Attributes:
        lookup_tokens: Tokens of all prompts that were matched.
        hit_tokens: Tokens of these that were there.
        inserted_tokens: Tokens whose rows were copied in.
        entries: Blocks and snapshots that can be found.
        current_bytes: Physical bytes of them and of what is deferred, each byte once.
        evictions: Blocks and snapshots that left to make room.
        bypassed: Calls that went past the cache.
        mismatches: Blocks under the right key that are damaged, of an older format or of other tokens, which are
            dropped, and matches that other weights' blocks cut short. Nothing of these is handed out.
    """

    lookup_tokens: int
    hit_tokens: int
    inserted_tokens: int
    entries: int
    current_bytes: int
    evictions: int
    bypassed: int
    mismatches: int
