"""How far logits are apart, and how far rounding alone moves them in the same model."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from transformers.pytorch_utils import Conv1D

from agnostic_cache_adapters.transformers.model_copy import wrapped

_RULED_OUT: Final = -1e4  # some classes rule tokens out by -inf, some by a large number


def distance(expected: torch.Tensor, seen: torch.Tensor) -> float:
    """Return the median over positions of the rms difference of logits over their spread."""
    expected, seen = (logits.float().flatten(0, -2) for logits in (expected, seen))
    if expected.shape != seen.shape:
        return float("inf")
    there = (expected > _RULED_OUT) & expected.isfinite()
    if not bool((there == ((seen > _RULED_OUT) & seen.isfinite())).all()) or not bool(there.any()):
        return float("inf")
    count = there.sum(-1).clamp_min(1)
    one, two = (torch.where(there, logits, 0.0) for logits in (expected, seen))
    mean = one.sum(-1, keepdim=True) / count[:, None]
    spread = torch.where(there, one - mean, 0.0).square().sum(-1).div(count).sqrt().clamp_min(1e-12)
    return float(((one - two).square().sum(-1).div(count).sqrt() / spread).median())


def rounding_differently(copied: Any, eps: float) -> AbstractContextManager[None]:
    """Let every linear map, embedding and norm round a little differently, at random."""
    random = torch.Generator(copied.device).manual_seed(0)

    def perturbed(_: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        def rounded(*args: Any, **kwargs: Any) -> Any:
            out = call(*args, **kwargs)
            if not isinstance(out, torch.Tensor) or not out.is_floating_point():
                return out
            steps = torch.randint(-1, 2, out.shape, generator=random, device=random.device)
            return out * (1 + eps * steps.to(out.device, out.dtype))

        return rounded

    kinds = (torch.nn.Linear, torch.nn.Embedding, torch.nn.LayerNorm, Conv1D)
    noisy = [each for each in copied.modules() if isinstance(each, kinds) or type(each).__name__.endswith("Norm")]
    return wrapped(noisy, perturbed)
