"""Whether a model goes on rightly from a state of its own: proven on the model, by a dozen forwards of 48 tokens.

A prefix can be reused where the state after some tokens does not depend on those that follow, and where a prompt
computed in pieces gives the logits of one pass. Rows can be moved where a state keeps its meaning behind left padding.
Differences of logits count per position, as rms over their spread; their median over positions is held against the
rounding noise of the same model, since single positions of a mixture of experts flip by rounding alone. Short pieces
late in the prompt tell most; the last position alone tells nothing in 16 bits.
"""

import enum
import inspect
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import torch

from agnostic_cache.arrays.roles import SNAPSHOT
from agnostic_cache_adapters.transformers import layers, windows
from agnostic_cache_adapters.transformers.full_precision import compute_in_fp32
from agnostic_cache_adapters.transformers.model_copy import copy_of, undisturbed
from agnostic_cache_adapters.transformers.rounding import distance, rounding_differently
from agnostic_cache_adapters.transformers.runs import Runs, texts
from agnostic_cache_adapters.transformers.stacking import UnknownLayerError, stacked

TOKENS: Final = 48
"""What the proof computes at a time, at most: what begins to act later is not seen."""

_MARKS: Final = ("token_type_ids", "mm_token_type_ids")
_HALF: Final = 24
_WINDOW: Final = 16
_ALL: Final = 1 << 20  # tokens to select: all there are
_PIECES: Final = (19, 20, 4, 4, 1)
_ROWS: Final = (23, 40)  # lengths of two prefixes of one batch, each continued by `_MORE` tokens
_MORE: Final = 8
# A difference of more than so many times the rounding noise is none of rounding. Right types reach 3.7 in fp32, and 1.1
# and 0.8 in fp16 and bf16; wrong ones begin at 81, 40 and 5.
_LIMITS: Final = {torch.float32: 20.0, torch.float64: 20.0, torch.float16: 6.0, torch.bfloat16: 2.0}
_WEAK: Final = 5.0  # times the limit: where the first half of a prompt changes less, a lost state would not show
_SINGLE: Final = 50.0  # times less counts a single position: experts flip there, and plain decoding steps by one, too
_OUT_OF_MEMORY: Final = (MemoryError, torch.OutOfMemoryError)  # says nothing of the model


class Why(enum.StrEnum):
    """Why a prefix, or a moved row, is not served."""

    NO_CACHE = "no_cache"
    FUTURE = "future"
    PIECES = "pieces"
    RAISES = "raises"
    WEAK = "weak"
    ROUNDING = "rounding"
    ROWS = "rows"
    SHARDED = "sharded"
    FAILED = "failed"


SENTENCES: Final = {
    Why.NO_CACHE: "the model hands out no KV cache",
    Why.FUTURE: "what the model computes for a token depends on the tokens that follow",
    Why.PIECES: "the model computes something else where several tokens follow its own state",
    Why.RAISES: "the model raises where several tokens follow its own state",
    Why.WEAK: "the model hardly depends on its past, so that a lost state would not show",
    Why.ROUNDING: "the model computes in 16 bits or fewer, whose rounding would hide that its recurrent state is lost",
    Why.ROWS: "a row that is moved behind left padding means something else to the model",
    Why.SHARDED: "the model is spread over several processes and is not in the table of verdicts",
    Why.FAILED: "the model could not be tried",
}


class Proof(NamedTuple):
    """What was found.

    Attributes:
        prefix: Whether a prefix can be reused.
        rows: Whether its state may stand in a row with left padding.
        marked: Whether a prefix can also be reused in calls that pass ``token_type_ids``.
        limit: The tokens up to which that was seen; None where nothing begins to act later.
        selected: Whether that was seen, too, where the model sees only those tokens that score highest.
        why: What is wrong, first of all.
        detail: More about it: the class of an error.
        ratios: Each difference in units of rounding noise.
    """

    prefix: bool
    rows: bool = False
    marked: bool = False
    limit: int | None = None
    selected: bool = True
    why: Why | None = None
    detail: str = ""
    ratios: Mapping[str, float] = {}


def prove(model: Any) -> Proof:
    """Prove a model, on a copy of it that shares its weights.

    Not for two threads at a time: see `undisturbed`.

    Raises:
        Exception: Whatever the model raises when it computes one pass, or when it cannot be copied.
    """
    if _is_sharded(model):
        return Proof(prefix=False, why=Why.SHARDED)
    with undisturbed(model.device):
        proof, proving = _prove_once(model)
        later = windows.of(proving.model.config, TOKENS)
        selecting = [each for each in later if each.acts is windows.Acts.SELECTS]
        if proof.prefix:
            proof = _prove_within(proving, proof, [each for each in later if each not in selecting])
        if proof.prefix and selecting:
            # Ties of a selection fall at random: a difference there is no more than unproven.
            proof = proof._replace(selected=_shrunk(proving, selecting)[0].prefix)
        return proof


def _prove_once(model: Any) -> "tuple[Proof, _Proving]":
    copied = copy_of(model)
    if compute_in_fp32(copied):
        runner = _Proving(copied, torch.float32)
        try:
            return runner.proof(), runner
        except (RuntimeError, TypeError) as error:  # out of memory, or a dtype that the class insists on
            if model.dtype not in _LIMITS or model.dtype is torch.float32:
                raise
            del runner, copied
            error.__traceback__ = None  # frees what it holds
    runner = _Proving(copy_of(model), model.dtype if model.dtype in _LIMITS else torch.bfloat16)
    proof = runner.proof()
    if proof.prefix and not runner.keeps_rows():
        return Proof(prefix=False, why=Why.ROUNDING, ratios=proof.ratios), runner
    return proof, runner


def _prove_within(proving: "_Proving", proof: Proof, found: list[windows.Window]) -> Proof:
    """Prove again with windows that are smaller than the proof; where that changes nothing, the window is unproven."""
    if not found:
        return proof
    within, changed = _shrunk(proving, found)
    if within.why in {Why.PIECES, Why.FUTURE}:
        return within
    cutting = [each.value for each in found if each.acts is windows.Acts.CUTS]
    ratios = {**proof.ratios, **{f"small windows: {name}": ratio for name, ratio in within.ratios.items()}}
    if within.prefix and (changed or not cutting):
        return proof._replace(rows=proof.rows and within.rows, ratios=ratios)
    return proof._replace(limit=min(cutting or [each.value for each in found]) - 1, ratios=ratios)


def _shrunk(proving: "_Proving", found: list[windows.Window]) -> tuple[Proof, bool]:
    """Return the proof of the copy with small windows, and whether that computes something else."""
    before = proving.one
    windows.resize(proving.model, found, _WINDOW)
    try:
        proof = proving.proof()
    except _OUT_OF_MEMORY:
        raise
    except Exception as error:  # noqa: BLE001 - a class that cannot be shrunk so is a limit, not a failed call
        return Proof(prefix=False, why=Why.RAISES, detail=type(error).__name__), False
    return proof, proof.prefix and proving.ratio(before[:, _WINDOW:], proving.one[:, _WINDOW:]) > proving.limit


class _Proving(Runs):
    """A copy of a model under proof.

    Attributes:
        one: The logits of one pass, shape (1, tokens, vocabulary).
        limit: The ratio that is allowed.
    """

    def __init__(self, copied: Any, dtype: torch.dtype) -> None:
        super().__init__(copied)
        windows.resize(copied, [each for each in windows.of(copied.config) if each.acts is windows.Acts.SELECTS], _ALL)
        self.limit = _LIMITS[dtype]
        self.one = torch.empty(0)
        self._eps = torch.finfo(dtype).eps / 2
        self._noise = 0.0
        self._cache: Any = None

    def keeps_rows(self) -> bool:
        """Say whether the cache keeps rows of tokens and nothing else: it has no state that could be lost."""
        plans = [layers.plan(layer) for layer in getattr(self._cache, "layers", [None])]
        return all(plan and all(part.hint.role is not SNAPSHOT for part in plan.parts.values()) for plan in plans)

    def ratio(self, expected: torch.Tensor, seen: torch.Tensor) -> float:
        """Return the median distance of logits in units of the rounding noise."""
        return distance(expected, seen) / self._noise

    def proof(self) -> Proof:
        """Prove the copy as it is now."""
        ratios: dict[str, float] = {}
        ids, other = texts(self.model, TOKENS)
        why, detail = self._against_prefix(ids, other, ratios)
        if why is not None:
            return Proof(prefix=False, why=why, detail=detail, ratios=ratios)
        why, detail = self._against_rows(ids, ratios)
        marked = ratios["marked"] <= self.limit
        return Proof(prefix=True, rows=why is None, marked=marked, why=why, detail=detail, ratios=ratios)

    def _against_prefix(
        self, ids: torch.Tensor, other: torch.Tensor, ratios: dict[str, float]
    ) -> tuple[Why | None, str]:
        self.one, self._cache = self.run(ids)
        if self._cache is None:
            return Why.NO_CACHE, ""
        with rounding_differently(self.model, self._eps):
            self._noise = max(distance(self.one, self.run(ids)[0]), 1e-7)
        mixed = torch.cat([ids[:, :_HALF], other[:, _HALF:]], 1), torch.cat([other[:, :_HALF], ids[:, _HALF:]], 1)
        pair = self.run(torch.cat(mixed))[0]
        ratios["future"] = self.ratio(self.one[:, :_HALF], pair[:1, :_HALF])
        seen = slice(_HALF, _HALF + self._reach())
        ratios["signal"] = self.ratio(self.one[:, seen], pair[1:, seen])
        ratios["marked"] = self._marked(torch.cat([ids, mixed[0]]))
        if ratios["future"] > self.limit:
            return Why.FUTURE, ""
        try:
            ratios["pieces"] = self._pieces(ids)
        except _OUT_OF_MEMORY:
            raise
        except Exception as error:  # noqa: BLE001 - the model's own; what it cannot do, no call of ours may ask for
            return Why.RAISES, type(error).__name__
        if ratios["pieces"] > self.limit:
            return Why.PIECES, ""
        return (Why.WEAK if ratios["signal"] < _WEAK * self.limit else None), ""

    def _against_rows(self, ids: torch.Tensor, ratios: dict[str, float]) -> tuple[Why | None, str]:
        try:
            ratios["rows"] = self._rows(ids)
        except UnknownLayerError as error:
            return Why.ROWS, str(error)
        except _OUT_OF_MEMORY:
            raise
        except Exception as error:  # noqa: BLE001 - as above
            return Why.ROWS, type(error).__name__
        return (Why.ROWS if ratios["rows"] > self.limit else None), ""

    def _reach(self) -> int:
        """Return how many tokens of the second half see some of the first, whatever windows there are."""
        cutting = [each.value for each in windows.of(self.model.config) if each.acts is windows.Acts.CUTS]
        return max(min([_HALF, *(value - 1 for value in cutting)]), 1)

    def _marked(self, pair: torch.Tensor) -> float:
        """Return the ratio of two marked prompts that begin alike: some models attend in both directions then."""
        names = inspect.signature(type(self.model).forward).parameters
        marks: dict[str, Any] = {name: torch.ones_like(pair) for name in _MARKS if name in names}
        if not marks:
            return 0.0
        try:
            both = self.run(pair, **marks)[0]
        except Exception:  # noqa: BLE001 - the model's own: such a call is not served
            return float("inf")
        return self.ratio(both[:1, :_HALF], both[1:, :_HALF])

    def _pieces(self, ids: torch.Tensor) -> float:
        """Return the ratio of the piece that differs most from one pass, or of all of them together."""
        cache, start, seen, ratios = None, 0, [], []
        for length in _PIECES:
            stop = start + length
            logits, cache = self.run(ids[:, :stop], cache, start)
            if start:
                seen.append(logits)
                ratios.append(self.ratio(self.one[:, start:stop], logits) / (_SINGLE if length == 1 else 1))
            start = stop
        return max(*ratios, self.ratio(self.one[:, _PIECES[0] :], torch.cat(seen, 1)))

    def _rows(self, ids: torch.Tensor) -> float:
        """Return the ratio of two prefixes that go on together, the shorter one behind padding."""
        width = max(_ROWS)
        cache = stacked([self.run(ids[:, :length])[1] for length in _ROWS], width)
        rows, mask = ids.repeat(len(_ROWS), 1)[:, : width + _MORE], torch.ones_like(ids).repeat(len(_ROWS), 1)
        for i, length in enumerate(_ROWS):
            rows[i] = rows[i].roll(width - length)
            mask[i, : width - length] = 0
        logits, _ = self.run(rows, cache, width, mask[:, : width + _MORE])
        spans = [self.one[:, length : length + _MORE] for length in _ROWS]
        return max(self.ratio(span, row) for span, row in zip(spans, logits[:, None], strict=True))


def _is_sharded(model: Any) -> bool:
    def spread(weight: Any) -> bool:
        return hasattr(weight, "placements") or hasattr(weight, "ds_id")

    kinds = {type(module).__name__ for module in model.modules()}
    parallel = getattr(model, "_tp_size", None) not in {None, 1}
    return parallel or any(map(spread, model.parameters())) or any("FullyShardedDataParallel" in kind for kind in kinds)
