"""The calls that a tiny model is asked through a cache, each compared with plain ``generate``: tokens and logits.

Every answer of plain ``generate`` is computed before the first call through a cache: where a model keeps something of
its last call, it has kept it from a call through a cache, as in a server.
"""

import copy
import functools
import inspect
import math
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import architectures
import torch
from architectures import FIRST_WORD, VOCABULARY

from agnostic_cache import PrefixCache, StateCache, model_fingerprint, wrap
from agnostic_cache.errors import CacheBypassWarning, UnknownValueError
from agnostic_cache_adapters.transformers import generate

NEW = 6  # tokens of an answer
BLOCK = 16
CLOSE = 1e-5  # of the largest logit: what float32 loses by another order of sums
HIDDEN = 1e30  # logits beyond are masked: minus infinity, or the least float

REUSE, BYPASS, WRONG, EXCEPTION, PLAINFAIL, UNBUILT = (
    "REUSE",
    "BYPASS",
    "WRONG",
    "EXCEPTION",
    "PLAINFAIL",
    "UNBUILT",
)
SILENT = "no hit, and no reason"
_STATES = ("past_key_values", "cache_params", "cache")  # names of what generate takes and gives back
_LAYERS = {
    "DynamicLayer": "full",
    "DynamicIndexedLayer": "indexed",
    "DynamicSlidingWindowLayer": "sliding",
    "LinearAttentionLayer": "recurrent",
    "LinearAttentionAndFullAttentionLayer": "recurrent and full in one",
    "LinearAttentionAndSlidingWindowAttentionLayer": "recurrent and sliding in one",
    "DummyLayer": "none",
}


class Call(NamedTuple):
    """What came of one call.

    Attributes:
        off: The largest difference of logits over the largest logit; infinite where tokens differ.
        hit: Tokens that the cache had.
        bypassed: Why the call went past the cache, where it did.
        error: What it raised.
    """

    off: float = 0.0
    hit: int = 0
    bypassed: str = ""
    error: str = ""

    @property
    def wrong(self) -> bool:
        return not self.off <= CLOSE


class Result(NamedTuple):
    """What came of all calls of a type.

    Attributes:
        model_type: The type.
        family: Which of its classes: `architectures.CLASSES`.
        verdict: REUSE (right, with hits), BYPASS (right, without), WRONG, EXCEPTION (ours raised), PLAINFAIL (plain
            ``generate`` raised), UNBUILT.
        reason: Of the verdict: why there are no hits, which calls are wrong and by how much, or what was raised.
        layers: What the layers of its cache keep.
        calls: Each call, by name.
        unasked: Calls that plain ``generate`` raises in, and what.
        weak: Whether logits hardly depend on the past, so that equal ones say little.
    """

    model_type: str
    family: str
    verdict: str
    reason: str = ""
    layers: str = ""
    calls: dict[str, Call] = {}  # noqa: RUF012 - never written to
    unasked: dict[str, str] = {}  # noqa: RUF012 - never written to
    weak: bool = False


class _Step(NamedTuple):
    """One call: its prompts, one or several, and the cache that it goes through."""

    name: str
    cache: str
    prompts: list[list[int]]
    options: dict[str, Any] = {}  # noqa: RUF012 - never written to
    arguments: dict[str, Any] = {}  # noqa: RUF012 - never written to


class _Answer(NamedTuple):
    sequences: Any
    tokens: list[int]
    logits: torch.Tensor
    native: Any


def words(count: int, seed: int) -> list[int]:
    """Return random words."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD, VOCABULARY, (count,), generator=random).tolist()


DOCUMENT = words(70, 1)
FIRST, SECOND, THIRD = words(7, 2), words(9, 3), words(11, 4)
RAGGED = [DOCUMENT + FIRST, DOCUMENT + SECOND + words(5, 6), DOCUMENT[:30] + THIRD]
EVEN = [DOCUMENT + FIRST, DOCUMENT + words(7, 9)]
UNRELATED = [words(24, 11), words(24, 12)]
SAMPLED = {"do_sample": True, "top_k": 20, "temperature": 1.5}


def _steps(
    first: list[int], second: Callable[[list[int]], list[int]], image: tuple[list[int], dict[str, Any]] | None
) -> Iterator[_Step]:
    """Yield the calls; `first` is the answer to the first question, `second` answers the next turn."""
    questions = [DOCUMENT + question for question in (FIRST, SECOND, THIRD)]
    turn2 = questions[0] + first + SECOND
    turn3 = turn2 + second(turn2) + THIRD
    for name, prompt in (
        ("question 1", questions[0]),
        ("question 2", questions[1]),
        ("question 3", questions[2]),
        ("question 1 again", questions[0]),
        ("shorter", DOCUMENT[:37]),
        ("diverging in mid-block", DOCUMENT[:53] + words(20, 5)),
        ("chat turn 2", turn2),
        ("chat turn 3", turn3),
    ):
        yield _Step(name, "talk", [prompt])
    yield _Step("ragged batch", "talk", RAGGED)
    yield _Step("question 2 after the batch", "talk", [questions[1]])
    yield _Step("unrelated batch", "talk", UNRELATED)
    yield _Step("question 3 after it", "talk", [questions[2]])
    yield _Step("ragged batch first", "ragged", RAGGED)
    yield _Step("question 1 after it", "ragged", [questions[0]])
    yield _Step("even batch first", "even", EVEN)
    yield _Step("question 2 after that", "even", [questions[1]])
    yield _Step("part of the document", "part", [DOCUMENT[:40] + THIRD])
    yield _Step("even batch after the part", "part", EVEN)
    yield _Step("beams", "talk", [questions[1]], {"num_beams": 3})
    yield _Step("sampling", "talk", [questions[2]], SAMPLED)
    if image is not None:
        yield _Step("an image", "talk", [image[0]], {}, image[1])
        yield _Step("question 2 after the image", "talk", [questions[1]])
    yield _Step("exact, question 1", "exact", [questions[0]])
    yield _Step("exact, question 2", "exact", [questions[1]])
    yield _Step("exact, question 2 again", "exact", [questions[1]])


class _Asked:
    """A model and how it is asked."""

    def __init__(self, model: Any) -> None:
        self.model = model
        names = inspect.signature(type(model).generate).parameters
        self.name = "input_ids" if "input_ids" in names or model.main_input_name != "input_ids" else "inputs"

    def arguments(self, step: _Step) -> dict[str, Any]:
        prefix = architectures.prefix(self.model)
        width = max(map(len, step.prompts))
        rows = [[0] * (width - len(prompt)) + prefix + prompt for prompt in step.prompts]
        mask = [[0] * (width - len(prompt)) + [1] * (len(prefix) + len(prompt)) for prompt in step.prompts]
        return {
            self.name: torch.tensor(rows),
            "attention_mask": torch.tensor(mask),
            "max_new_tokens": NEW,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
            **architectures.inputs(self.model, len(rows)),
            **step.options,
            **step.arguments,
        }

    def ask(self, how: Callable[..., Any], step: _Step, **more: Any) -> _Answer:
        torch.manual_seed(7)
        with torch.no_grad():
            out = how(**{**self.arguments(step), **more})
        if not out.get("logits"):
            message = "generate returns no logits"
            raise TypeError(message)
        native = next((value for name in _STATES if (value := out.get(name)) is not None), None)
        logits = torch.stack(out.logits, 1).float()
        return _Answer(out.sequences.tolist(), out.sequences[0].reshape(-1)[-NEW:].tolist(), logits, native)


def difference(want: _Answer, got: _Answer) -> float:
    """Return the largest difference of logits over the largest logit; infinite where tokens differ."""
    if want.sequences != got.sequences or want.logits.shape != got.logits.shape:
        return math.inf
    shown = want.logits.abs() < HIDDEN
    if not torch.equal(shown, got.logits.abs() < HIDDEN):
        return math.inf
    one, other = want.logits[shown], got.logits[shown]
    return float((one - other).abs().max() / one.abs().max())


def check(model_type: str, family: str, fields: Mapping[str, Any] | None = None) -> Result:
    """Build the tiny model of a type, ask it, and say what came of it.

    Never raises what transformers or we raise: that is the result.

    Args:
        model_type: The type.
        family: Which of its classes: `architectures.CLASSES`.
        fields: Of its config, where they differ from those of the tiny one.
    """
    try:
        model = architectures.tiny(model_type, family, fields)
    except Exception as error:  # noqa: BLE001 - whatever a config or a class refuses is why there is no model
        return Result(model_type, family, UNBUILT, told(error))
    return check_model(model, model_type, family)


def check_model(model: Any, model_type: str, family: str) -> Result:
    """Ask a model, and say what came of it."""
    asked = _Asked(model)
    plain = functools.partial(type(model).generate, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            opening = asked.ask(plain, _Step("question 1", "", [DOCUMENT + FIRST]))
        except Exception as error:  # noqa: BLE001 - whatever transformers raises is the result
            return Result(model_type, family, PLAINFAIL, told(error))
        weak = _weak(asked, plain, opening)
        second = lambda prompt: asked.ask(plain, _Step("", "", [prompt])).tokens  # noqa: E731 - one expression
        steps = list(_steps(opening.tokens, second, architectures.image(model)))
        wanted: dict[str, _Answer] = {}
        unasked: dict[str, str] = {}
        for step in steps:
            try:
                wanted[step.name] = asked.ask(plain, step)
            except Exception as error:  # noqa: BLE001 - plain cannot do it: nothing to compare with
                unasked[step.name] = told(error)
    caches: dict[str, PrefixCache] = {}
    calls = {step.name: _through(asked, caches, step, wanted[step.name]) for step in steps if step.name in wanted}
    state, why = _state_round_trip(asked, plain)
    if state is not None:
        calls["StateCache"] = state
    elif why:
        unasked["StateCache"] = why
    verdict, reason = _verdict(calls)
    return Result(model_type, family, verdict, reason, _layers(opening.native), calls, unasked, weak)


def _weak(asked: _Asked, plain: Callable[..., Any], opening: _Answer) -> bool:
    """Whether another token near the end of the document hardly changes the first logits."""
    other = [*DOCUMENT[:-4], FIRST_WORD + (DOCUMENT[-4] - FIRST_WORD + 31) % (VOCABULARY - FIRST_WORD), *DOCUMENT[-3:]]
    changed = asked.ask(plain, _Step("", "", [other + FIRST])).logits[:, 0]
    before = opening.logits[:, 0]
    shown = before.abs() < HIDDEN
    return bool((changed - before)[shown].abs().max() < 100 * CLOSE * before[shown].abs().max())


def _through(asked: _Asked, caches: dict[str, PrefixCache], step: _Step, want: _Answer) -> Call:
    cache = caches.get(step.cache)
    if cache is None:
        space = model_fingerprint(asked.model)
        cache = caches[step.cache] = PrefixCache(
            "64MiB", namespace=space, block_size=BLOCK, exact=step.cache == "exact", strict=True
        )
    before = cache.stats()
    ours = lambda **arguments: generate(asked.model, cache, **arguments)  # noqa: E731 - one expression
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            got = asked.ask(ours, step)
        except Exception as error:  # noqa: BLE001 - the result
            return Call(error=told(error))
    after = cache.stats()
    said = [str(one.message) for one in heard if issubclass(one.category, CacheBypassWarning)]
    why = said[0].removeprefix("PrefixCache is bypassed: ") if said else ""
    bypassed = why or ("as before" if after.bypassed > before.bypassed else "")
    return Call(difference(want, got), after.hit_tokens - before.hit_tokens, bypassed)


def _state_round_trip(asked: _Asked, plain: Callable[..., Any]) -> tuple[Call | None, str]:
    """Go on from a state that a StateCache has kept; None, and why, where plain ``generate`` cannot."""
    step = _Step("", "", [DOCUMENT + FIRST])
    if asked.model.config.is_encoder_decoder:
        return None, "a state of an encoder's prompt has nothing to go on from"
    try:
        native = asked.ask(plain, _Step("", "", [DOCUMENT]), max_new_tokens=1).native
        if native is None:
            return None, "generate returns no state"
        taken = inspect.signature(type(asked.model).forward).parameters
        name = next((name for name in _STATES if name in taken), _STATES[0])
        want = asked.ask(plain, step, **{name: copy.deepcopy(native)})
    except Exception as error:  # noqa: BLE001 - plain cannot do it: nothing to compare with
        return None, told(error)
    kept = StateCache("64MiB")
    try:
        length = len(architectures.prefix(asked.model)) + len(DOCUMENT)
        alone = _layers(native) == "recurrent"  # which says no length
        kept.put("state", wrap(native, length=length) if alone else native)
        offs = []
        for _ in range(2):  # the first has been gone on from when the second is handed out
            one: Any = kept.get("state")
            offs.append(difference(want, asked.ask(plain, step, **{name: one.unwrap() if alone else one})))
        kept.remove("state")
    except UnknownValueError as error:
        return None, f"refused: {error}"
    except Exception as error:  # noqa: BLE001 - the result
        return Call(error=told(error)), ""
    return Call(max(offs) if not kept.current_bytes else math.inf), ""


def _verdict(calls: dict[str, Call]) -> tuple[str, str]:
    errors = {name: call.error for name, call in calls.items() if call.error}
    if errors:
        least = "; ".join(dict.fromkeys(errors.values()))
        return EXCEPTION, f"{', '.join(errors)}: {least}"
    wrong = {name: call.off for name, call in calls.items() if call.wrong}
    if wrong:
        return WRONG, ", ".join(
            f"{name} ({'tokens' if off == math.inf else f'{off:.0e}'})" for name, off in wrong.items()
        )
    reasons = list(dict.fromkeys(call.bypassed for call in calls.values() if call.bypassed not in {"", "as before"}))
    if calls["question 2"].hit:
        return REUSE, "; ".join(reasons)
    return BYPASS, "; ".join(reasons) or SILENT


def _layers(native: Any) -> str:
    """What the layers of a cache keep, in words; empty where that is no cache of layers."""
    for name in ("self_attention_cache", "decoder"):
        native = getattr(native, name, native)
    found = Counter(_LAYERS.get(type(layer).__name__, type(layer).__name__) for layer in getattr(native, "layers", ()))
    return ", ".join(sorted(found)) or (type(native).__name__ if native is not None else "no cache")


def told(error: BaseException) -> str:
    """An error in one line: its class, its first words, and the line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = "/".join(last.filename.split("/")[-2:])
    words = re.sub(r"\s+", " ", str(error)).strip()[:160]
    return f"{type(error).__name__}: {words} ({place}:{last.lineno})"
