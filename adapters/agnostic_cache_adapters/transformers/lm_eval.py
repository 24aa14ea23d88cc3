"""lm-eval's ``hf`` model for prompts that begin alike: what they share, few-shot examples say, is computed once.

Importing this module registers the model as ``hf-cached``; it needs the extra ``lm-eval``.
"""

# lm-eval is not installed where types are checked.
# pyright: reportMissingImports=false

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm  # type: ignore[import-untyped]

from agnostic_cache.fingerprint import model_fingerprint
from agnostic_cache.prefix import PrefixCache
from agnostic_cache_adapters.transformers.generation import reuse
from agnostic_cache_adapters.transformers.scoring import scores

_Request = tuple[tuple[str, str], list[int], list[int]]
"""Its texts; its context and its continuation, in tokens."""


@register_model("hf-cached")
class CachedHFLM(HFLM):  # type: ignore[misc]
    """lm-eval's ``hf`` model, with the same answers in less time.

    The continuations of one context are computed side by side, in fp32 of full logits, from the longest part of the
    context that is known; so is what ``generate_until`` generates. All else is `HFLM`.

    Questions share their examples where the task says ``sampler: first_n``, as MMLU does. By default lm-eval draws
    others for each question: then the choices of one question share their context, and no more.

        model = CachedHFLM(pretrained="HuggingFaceTB/SmolLM2-135M", prefix_cache="8GiB")
        lm_eval.simple_evaluate(model=model, tasks=["hellaswag"], num_fewshot=10)
    """

    def __init__(self, *args: Any, prefix_cache: PrefixCache | int | str = "4GiB", **settings: Any) -> None:
        """Make the model.

        Args:
            *args: Of `HFLM`.
            prefix_cache: A cache for this model, or the bytes that one may take.
            **settings: Of `HFLM`.
        """
        super().__init__(*args, **settings)
        if not isinstance(prefix_cache, PrefixCache):
            prefix_cache = PrefixCache(prefix_cache, namespace=model_fingerprint(self.model))
        self.prefix_cache = prefix_cache

    def _loglikelihood_tokens(
        self,
        requests: Sequence[_Request],
        disable_tqdm: bool = False,  # noqa: FBT001, FBT002 - as it is called
        override_bs: int | None = None,
    ) -> Any:
        if self.backend != "causal" or override_bs is not None:  # windows of one text: nothing in them is shared
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            kept = tuple((context + continuation)[-(self.max_length + 1) : -len(continuation)])  # as `HFLM` shortens it
            groups.setdefault(kept, []).append(i)
        found: dict[int, tuple[float, bool]] = {}
        done = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        dtype = self.mixed_precision_dtype
        with done, torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            for kept, members in sorted(groups.items()):  # those that begin alike follow one another
                continuations = [requests[i][2] for i in members]
                for i, one in zip(members, scores(self.model, self.prefix_cache, kept, continuations), strict=True):
                    found[i] = (one.log_likelihood, one.is_greedy)
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
                done.update(len(members))
        return [found[i] for i in range(len(requests))]

    def _model_generate(self, *args: Any, **settings: Any) -> Any:
        with reuse(self.model, self.prefix_cache):
            return super()._model_generate(*args, **settings)
