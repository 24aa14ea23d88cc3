"""A chat over a document: the time to each turn's first token, with a `PrefixCache` and without one.

The prompt of a turn is the whole conversation up to there, as a chat program sends it. Without a cache all of it is
computed again; with one, which knows the document from before, only the end of the last answer and the question.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

import smollm2
from agnostic_cache import PrefixCache

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from agnostic_cache import KVState
    from loops import Answer, Loop

QUESTIONS = (
    smollm2.QUESTIONS[0],
    "And what does the continue statement do?",
    "How do I delete a name?",
    "How do I raise an exception?",
    "Which statement does nothing?",
)
NEW_TOKENS = 12
ROOM = 260
"""More tokens than questions and answers add to the document."""
# Fingerprints are per framework; frameworks that share a cache agree on a name for the weights.
NAMESPACE = "SmolLM2-135M-Instruct in fp32"
COLOURS = {"torch": "#d6541f", "jax": "#3367d6"}
LABELS = {"torch": "PyTorch, generate()", "jax": "JAX, a jitted loop"}
KINDS = frozenset(FigureCanvasAgg.get_supported_filetypes())


def make_cache(storage: str | None = None) -> PrefixCache:
    """Make a cache for the demo model, whichever framework runs it: empty, but for what is in the storage of a URL."""
    return PrefixCache("1GiB", namespace=NAMESPACE, storage=storage)


def talk(
    loop: Loop,
    document: list[int],
    tokenizer: PreTrainedTokenizerBase,
    say: Callable[[str], None],
    *,
    known: KVState | None = None,
    first_miss: Answer | None = None,
    storage: str | None = None,
) -> list[dict[str, Any]]:
    """Ask one question after the other, each answered with a cache and without one.

    Args:
        loop: Who answers.
        document: What the chat is about.
        tokenizer: Of the model.
        say: Told how far it is.
        known: The state of the document, where the cache is to know it.
        first_miss: The answer to the first question from nothing, where that is known already.
        storage: URL of what the cache begins with, and of where it leaves what it computed.

    Returns:
        The figures of each turn.
    """
    tokens, turns = document, list[dict[str, Any]]()
    with make_cache(storage) as cache:
        if known is not None:
            cache.insert(document, known)
        for text in QUESTIONS:
            say(f"{loop.name}: turn {len(turns) + 1} of a chat")
            tokens = tokens + (smollm2.next_question(tokenizer, text) if turns else smollm2.question(tokenizer, text))
            before = cache.stats().hit_tokens
            hit = loop.reply(tokens, NEW_TOKENS, cache)
            miss = loop.reply(tokens, NEW_TOKENS) if turns or first_miss is None else first_miss
            answer = [token for token in hit.ids if token != tokenizer.eos_token_id]
            turns.append(
                {
                    "question": text,
                    "answer": str(tokenizer.decode(answer)).strip(),
                    "prompt_tokens": len(tokens),
                    "hit_tokens": cache.stats().hit_tokens - before,
                    "with_seconds": hit.first_seconds,
                    "without_seconds": miss.first_seconds,
                    "tokens_equal": hit.ids == miss.ids,
                }
            )
            tokens = tokens + answer
    return turns


def draw(path: Path, chats: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Draw the time to the first token over the turns into an image whose kind the name's ending says.

    Args:
        path: Where to write it.
        chats: What `talk` returned, by name of the loop.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, turns in chats.items():
        numbers = range(1, len(turns) + 1)
        for kind, style, marker in (("without", "--", "s"), ("with", "-", "o")):
            axes.plot(
                numbers,
                [turn[f"{kind}_seconds"] for turn in turns],
                color=COLOURS[name],
                linestyle=style,
                linewidth=2.2 if kind == "with" else 1.4,
                marker=marker,
                markersize=6 if kind == "with" else 4,
                label=f"{LABELS[name]}, {kind} the cache",
            )
    ends = sorted((turns[-1]["with_seconds"], turns[-1]["without_seconds"], name) for name, turns in chats.items())
    for place, (hit, miss, name) in enumerate(ends):
        axes.annotate(
            f"{miss / hit:.0f} times\nsooner",
            (len(chats[name]), hit),
            (10, 13 * (2 * place - 1)),  # points, apart from one another
            textcoords="offset points",
            va="center",
            color=COLOURS[name],
        )
    prompts = [turn["prompt_tokens"] for turn in next(iter(chats.values()))]
    axes.set_xticks(range(1, len(prompts) + 1), [f"{i}\n{tokens:,}" for i, tokens in enumerate(prompts, 1)])
    axes.set_yscale("log")
    axes.set_xlim(right=len(prompts) + 0.6)
    axes.set_ylim(bottom=ends[0][0] / 2)
    axes.yaxis.set_major_locator(FixedLocator([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} s" if y >= 1 else f"{y * 1000:.0f} ms"))
    axes.set_title("A chat over a document of 2,048 tokens, which the cache knows", loc="left")
    axes.set_xlabel("turn, and tokens in its prompt")
    axes.set_ylabel("time to the first token")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=100)
