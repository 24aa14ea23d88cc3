"""How one call of ``generate`` is served."""

from collections.abc import Sequence
from typing import Any

import torch

from agnostic_cache_adapters.transformers import calls, prefill, release
from agnostic_cache_adapters.transformers.model_copy import generating
from agnostic_cache_adapters.transformers.verdicts import Verdict, verdict_of


class Plan:
    """How one call is served: the cache it goes on from, and what is stored when it is done."""

    def __init__(
        self,
        use: prefill.Use,
        prompts: calls.Prompts,
        kv: Any,
        argument: dict[str, Any],
        dropped: Sequence[str],
        verdict: Verdict,
    ) -> None:
        self.use = use
        self.prompts = prompts
        self.kv = kv
        self._argument = argument
        self._dropped = dropped
        self._verdict = verdict

    @classmethod
    def of(
        cls,
        model: Any,
        use: prefill.Use,
        config: Any,
        asked: dict[str, Any],
        mask: torch.Tensor | None,
        *,
        expanded: bool = False,
    ) -> "Plan | None":
        """Plan a call; None, with a warning, where it goes past the cache."""
        outer, model = model, generating(model)
        reason = calls.reason_to_bypass(outer, config, asked)
        prompts = None if reason else calls.prompts_of(asked["input_ids"], mask)
        kv: Any = None if reason else calls.fresh_cache(model)
        kinds = calls.kinds_of(kv)
        if prompts is None or kinds is None:
            unclear = "a mask that is not zeros and then ones" if prompts is None else calls.UNKNOWN_KIND
            use.cache.bypass(reason or unclear)
            return None
        if use.cache.block_size % kinds.stride:
            use.cache.bypass(f"block_size={use.cache.block_size} is no multiple of {kinds.stride} tokens per row")
            return None
        verdict = verdict_of(model)
        reason = calls.not_proven(verdict, asked)
        if reason:
            use.cache.bypass(reason)
            return None
        calls.forget_deltas(model)
        use = use._replace(context=calls.context_of(outer if hasattr(outer, "config") else model, use.cache, asked))
        copies = 1 if expanded else max(config.num_beams, config.num_return_sequences)
        rows = [row for row in prompts.rows for _ in range(copies)]
        pads = [pad for pad in prompts.pads for _ in range(copies)]
        prompts, tokens = calls.Prompts(rows, pads), rows[0]
        alone = all(row == tokens for row in rows) and not any(pads)
        dropped: Sequence[str] = ()
        if calls.keyed(asked):
            if not alone or kinds.windows or kinds.snapshots or use.cache.exact:
                use.cache.bypass("images, audio or own positions in a batch, or where a prompt is computed in parts")
                return None
            kv = prefill.loaded(model, use, tokens, kv)
            dropped = calls.prefill_only(asked) if kv.get_seq_length() else ()
            if dropped and calls.has_placeholders(model, tokens[kv.get_seq_length() :]):
                kv, dropped = calls.fresh_cache(model), ()
        elif alone:
            kv = prefill.state_of(model, use, tokens, kv, kinds)
        elif verdict.rows or not any(pads):
            kv = prefill.common_state(model, use, prompts, kv, kinds)
        if alone and len(rows) > 1 and kv.get_seq_length():
            prefill.repeat(kv.layers, len(rows))
        calls.forget_deltas(model)
        return cls(use, prompts, kv, release.generate_argument(model, kv), dropped, verdict)

    def reduced(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments with the loaded prefix, and without what that has taken up already."""
        # A cache of None is in the way of ours, and so is the name of the kind that ours is.
        gone = {*self._dropped, *release.CACHE_NAMES, "cache_implementation"}
        return {**{name: value for name, value in arguments.items() if name not in gone}, **self._argument}

    def store(self, result: Any) -> None:
        """Store what is new after a call: prompt and answer of one row, the prompts of several."""
        if not self.use.write or self.use.cache.exact:
            return
        rows, pads = self.prompts
        sequences = result if isinstance(result, torch.Tensor) else result.sequences
        if len(rows) == 1 and not pads[0]:
            length, limit = self.kv.get_seq_length(), self._verdict.limit
            if length <= sequences.shape[1]:
                proven = length if limit is None else min(length, limit)
                self.use.insert(sequences[0, :length].tolist(), self.kv, proven)
            return
        if any(pads) and not self._verdict.rows:
            return
        seen: set[tuple[int, ...]] = set()
        for i, (row, pad) in enumerate(zip(rows, pads, strict=True)):
            if tuple(row) not in seen:
                seen.add(tuple(row))
                own = prefill.row_of(self.kv, i, pad, pad + len(row))
                if own is not None:
                    self.use.insert(row, own)
