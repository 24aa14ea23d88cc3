"""History: what a policy is told again, where an interrupt or an error of its own left it half changed."""

from collections.abc import Collection

from agnostic_cache.eviction.policy import Policy
from agnostic_cache.held.entry import Entry


def replay(policy: Policy, entries: Collection[Entry]) -> None:
    """Reset a policy, and tell it of puts and last uses in the order in which they came."""
    events = [(entry.born, True, entry) for entry in entries]
    events += [(entry.tick, False, entry) for entry in entries if entry.tick != entry.born]
    policy.reset()
    for _, is_new, entry in sorted(events, key=lambda event: event[0]):
        if is_new:
            policy.added(entry.key, entry.nbytes, entry.cost)
        else:
            policy.used(entry.key)
