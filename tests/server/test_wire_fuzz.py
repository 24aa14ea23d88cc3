"""A million headers that are not what they should be."""

from random import Random

from server_thread import PUT, request

from agnostic_cache.errors import WireError
from agnostic_cache.wire import ClientMetaMessage

FUZZED = 1_000_000


def test_a_million_broken_headers() -> None:
    """Each is refused with the one error, or means what it says when it is written again."""
    random, whole = Random(0), request(PUT, b"meta/llama@2@1@be23@bfloat16", length=96, dtype=3, shape=(2, 3, 4, 2))
    refused = 0
    for _ in range(FUZZED):
        broken = bytearray(whole)
        for _ in range(random.randrange(1, 4)):
            broken[random.randrange(70)] = random.choice((0, 1, 2, 32, 48, 64, 128, 255, random.randrange(256)))
        try:
            found = ClientMetaMessage.deserialize(broken)
        except WireError:
            refused += 1
        else:
            assert ClientMetaMessage.deserialize(found.serialize()) == found
    assert 0 < refused < FUZZED
