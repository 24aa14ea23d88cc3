"""Verdicts on models: found by the proof alone, and what the proof leaves behind: nothing."""

import copy
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import small_model
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

from agnostic_cache_adapters.transformers import full_precision, proof, verdicts
from agnostic_cache_adapters.transformers.modeling_source import digest_of
from agnostic_cache_adapters.transformers.proof import Proof, Why, prove
from agnostic_cache_adapters.transformers.runs import texts
from agnostic_cache_adapters.transformers.verdicts import Verdicts, record_of

HALF = torch.bfloat16
WRONG = {"jamba": Why.PIECES, "recurrent_gemma": Why.PIECES, "mamba": Why.PIECES, "prophetnet": Why.RAISES}


@pytest.fixture(scope="module")
def kept() -> Any:
    return small_model("llama")


@pytest.fixture
def llama(kept: Any) -> Any:
    return copy.deepcopy(kept)


@pytest.fixture
def own(tmp_path: Path) -> Verdicts:
    return Verdicts({}, tmp_path / "verdicts")


# --- what the proof finds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRONG)
def test_a_lost_state_is_found(own: Verdicts, kind: str) -> None:
    verdict = own.of(small_model(kind))
    assert (verdict.prefix, verdict.rows, verdict.why, verdict.source) == (False, False, WRONG[kind], "proof")
    assert verdict.reason


@pytest.mark.parametrize("kind", ["jamba", "recurrent_gemma"])
def test_sixteen_bits_do_not_hide_a_lost_state(own: Verdicts, kind: str) -> None:
    assert own.of(small_model(kind).to(HALF)).why is Why.PIECES


def test_a_window_is_passed_however_long(own: Verdicts) -> None:
    assert own.of(small_model("moshi")).why is Why.PIECES
    right = own.of(small_model("mistral", sliding_window=3000))
    assert (right.prefix, right.rows, right.limit) == (True, True, None)


def test_a_window_that_cannot_be_made_small_is_a_limit(own: Verdicts) -> None:
    assert own.of(small_model("gpt_neo", window_size=200)).limit == 199


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mamba2", "bamba"])
def test_right_types_pass(own: Verdicts, kind: str) -> None:
    verdict = own.of(small_model(kind))
    assert (verdict.prefix, verdict.rows, verdict.limit, verdict.reason) == (True, True, None, None)


def test_rows_cannot_be_moved_where_columns_are_positions(own: Verdicts) -> None:
    verdict = own.of(small_model("bart"))
    assert (verdict.prefix, verdict.rows, verdict.why) == (True, False, Why.ROWS)


def test_tokens_that_are_marked_may_attend_in_both_directions(own: Verdicts) -> None:
    verdict = own.of(small_model("hrm_text", num_key_value_heads=4, head_dim=8))
    assert (verdict.prefix, verdict.marked) == (True, False)


class LooksAhead(LlamaForCausalLM):
    """Adds what all tokens of a pass have in common to each of them."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        hidden = self.get_input_embeddings()(input_ids)
        return super().forward(inputs_embeds=hidden + hidden.mean(1, keepdim=True), **kwargs)


def test_what_looks_ahead_is_found(own: Verdicts, llama: Any) -> None:
    model: Any = LooksAhead(llama.config)
    model.load_state_dict(llama.state_dict())
    assert own.of(model.eval()).why is Why.FUTURE


def test_a_weak_signal_proves_nothing(own: Verdicts, llama: Any) -> None:
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    verdict = own.of(llama)
    assert (verdict.prefix, verdict.why) == (False, Why.WEAK)


def test_rope_by_length_is_a_limit_whatever_the_source_of_the_verdict(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = small_model("llama", rope_parameters=rope, max_position_embeddings=96)
    proven = Verdicts({}, tmp_path).of(model)
    assert (proven.prefix, proven.limit) == (True, 96)
    listed = Verdicts({digest_of(model): record_of(prove(model))}, tmp_path).of(model)
    assert (listed.prefix, listed.limit, listed.source) == (True, 96, "table")


@pytest.mark.parametrize("whole_bytes", [0, 1 << 30])
def test_a_16_bit_model_is_proven_in_fp32_by_layers_or_whole(
    monkeypatch: pytest.MonkeyPatch, llama: Any, whole_bytes: int
) -> None:
    monkeypatch.setattr(full_precision, "_WHOLE_BYTES", whole_bytes)
    found = prove(llama.to(HALF))
    assert found.prefix
    assert found.rows
    assert found.ratios["signal"] > 1e4  # in 16 bits, rounding is a hundredth of the spread


def test_where_the_proof_cannot_leave_16_bits_a_recurrent_state_is_unproven(
    monkeypatch: pytest.MonkeyPatch, llama: Any
) -> None:
    monkeypatch.setattr(proof, "compute_in_fp32", lambda _: False)
    assert prove(small_model("bamba").to(HALF)).why is Why.ROUNDING
    assert prove(llama.to(HALF)).prefix


def test_ties_of_a_selection_are_unproven(monkeypatch: pytest.MonkeyPatch, own: Verdicts, llama: Any) -> None:
    llama.config.index_topk = 16
    assert own.of(llama).limit is None
    shrunk = Proof(prefix=False, why=Why.PIECES)
    monkeypatch.setattr(proof, "_shrunk", lambda *_: (shrunk, False))
    verdict = own.of(small_model("llama", index_topk=16, num_hidden_layers=1))
    assert (verdict.prefix, verdict.limit) == (True, 16)


def test_a_model_of_several_processes_is_not_tried(own: Verdicts, llama: Any) -> None:
    llama._tp_size = 2  # noqa: SLF001 - what transformers notes
    assert own.of(llama).why is Why.SHARDED


def test_the_shipped_table_knows_usual_models(tmp_path: Path, llama: Any) -> None:
    for model in (llama, small_model("mistral", sliding_window=4096), small_model("gpt2")):
        verdict = Verdicts(directory=tmp_path).of(model)
        assert (verdict.prefix, verdict.rows, verdict.limit, verdict.source) == (True, True, None, "table")
    assert Verdicts(directory=tmp_path).of(small_model("jamba")).why is Why.PIECES


# --- what it leaves behind --------------------------------------------------------------------------------------------


class Notes(LlamaForCausalLM):
    """Draws random numbers, counts its calls, and writes attributes, a buffer and a list in place."""

    written: torch.Tensor

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("written", torch.zeros(3))
        self.calls, self.seen = 0, [torch.zeros(1)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.written.add_(torch.rand(3))
        self.seen.append(self.written)
        self.seen[0].add_(1)
        self.config.noted = self.training
        return super().forward(*args, **kwargs)


@pytest.fixture
def notes(llama: Any) -> Any:
    model = Notes(llama.config)
    model.load_state_dict(llama.state_dict(), strict=False)
    return model.train()


def test_the_model_is_as_before(own: Verdicts, notes: Any) -> None:
    config = notes.config.to_dict()
    held = [{**vars(module)} for module in notes.modules()]
    tensors = {name: (tensor, tensor.clone()) for name, tensor in notes.state_dict(keep_vars=True).items()}
    assert own.of(notes).prefix
    assert (notes.calls, len(notes.seen), notes.seen[0].item(), notes.training) == (0, 1, 0.0, True)
    assert notes.config.to_dict() == config
    for module, before in zip(notes.modules(), held, strict=True):
        assert vars(module).keys() == before.keys()
        assert all(vars(module)[name] is value for name, value in before.items())
    for name, tensor in notes.state_dict(keep_vars=True).items():
        same, value = tensors[name]
        assert tensor is same
        assert torch.equal(tensor, value)
        assert tensor.grad is None


def test_random_numbers_go_on_as_if_nothing_was_drawn(own: Verdicts, notes: Any) -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    assert own.of(notes).source == "proof"
    assert torch.equal(torch.rand(4), expected)


@pytest.fixture
def fired() -> Iterator[list[str]]:
    calls: list[str] = []
    handles = [
        torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: calls.append("global")),
        torch.nn.modules.module.register_module_forward_hook(lambda *_: calls.append("global")),
    ]
    yield calls
    for handle in handles:
        handle.remove()


def test_no_hook_fires(own: Verdicts, llama: Any, fired: list[str]) -> None:
    for module in llama.modules():
        module.register_forward_pre_hook(lambda *_: fired.append("before"))
        module.register_forward_hook(lambda *_: fired.append("after"))
    assert own.of(llama).prefix
    assert fired == []
    llama(torch.tensor([[50]]))
    assert {*fired} == {"global", "before", "after"}


def test_nothing_compiled_runs(own: Verdicts, llama: Any) -> None:
    ran: list[str] = []

    def compiler(graph: Any, _: Any) -> Any:
        ran.append("compiled")
        return graph.forward

    llama.model.layers[0].compile(backend=compiler)
    llama.forward = torch.compile(llama.forward, backend=compiler)
    whole = torch.compile(llama, backend=compiler)
    assert own.of(whole).prefix
    assert own.of(llama).prefix
    assert ran == []


def test_a_forward_of_ones_own_is_proven_and_not_called_on_the_model(own: Verdicts, llama: Any) -> None:
    plain, called = llama.model.forward, [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        called.append(1)
        return plain(*args, **kwargs)

    llama.model.forward = counted
    llama.model.register_forward_hook(lambda *_: called.append(2))
    held = {**vars(llama.model)}
    assert own.of(llama).prefix
    assert called == [0]
    assert vars(llama.model) == held


class Wrapper(torch.nn.Module):
    """Hands generate on, as PEFT does."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.generate(*args, **kwargs)


def test_a_wrapper_has_the_verdict_of_what_it_wraps(own: Verdicts, llama: Any, proofs: list[Any]) -> None:
    assert own.of(Wrapper(llama)) == own.of(llama)
    assert proofs == [llama]


def test_no_special_token_is_among_the_texts(llama: Any) -> None:
    llama.config.image_token_id, llama.config.eos_token_id = 100, [2, 101]
    for text in texts(llama, 2000):
        assert {*text[0].tolist()}.isdisjoint({0, 1, 2, 100, 101})
        assert int(text.max()) < 128


# --- what becomes of errors -------------------------------------------------------------------------------------------


class Raises(LlamaForCausalLM):
    error: BaseException

    def forward(self, *_: Any, input_ids: Any = None, cache: Any = None, **__: Any) -> Any:  # noqa: ARG002 - read by generate
        raise self.error


def test_an_error_is_a_reason_and_is_not_kept(tmp_path: Path, llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = Raises(llama.config)
    Raises.error = torch.OutOfMemoryError("none left")
    verdict = Verdicts({}, tmp_path).of(model)
    assert (verdict.prefix, verdict.why) == (False, Why.FAILED)
    assert "OutOfMemoryError" in (verdict.reason or "")
    assert list(tmp_path.iterdir()) == []
    assert any(record.exc_info for record in caplog.records)


def test_an_interrupt_goes_through(own: Verdicts, llama: Any) -> None:
    model = Raises(llama.config)
    Raises.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        own.of(model)
    Raises.error = ValueError()
    assert own.of(model).why is Why.FAILED


def test_what_is_no_model_has_a_verdict(own: Verdicts) -> None:
    assert own.of(torch.nn.Linear(2, 2)).why is Why.FAILED


# --- how often --------------------------------------------------------------------------------------------------------


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []

    def counted(model: Any) -> Proof:
        made.append(model)
        return prove(model)

    monkeypatch.setattr(verdicts, "prove", counted)
    return made


def test_two_threads_prove_once(own: Verdicts, llama: Any, proofs: list[Any]) -> None:
    start, found = threading.Barrier(4), []

    def ask() -> None:
        start.wait()
        found.append(own.of(llama))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(proofs) == 1
    assert len({*found}) == 1


def test_a_verdict_is_read_from_disk_by_the_next_process(tmp_path: Path, llama: Any, proofs: list[Any]) -> None:
    first = Verdicts({}, tmp_path).of(llama)
    second = Verdicts({}, tmp_path).of(copy.deepcopy(llama))
    assert (first.source, second.source, len(proofs)) == ("proof", "disk", 1)
    assert second._replace(source="proof") == first
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "damaged",
    [b"", b"\xff\xfe", b"[" * 100_000, b"[]", b"{}", b"null"],
    ids=["empty", "no text", "deep", "list", "bare", "null"],
)
def test_a_file_that_cannot_be_read_is_proven_again(
    tmp_path: Path, llama: Any, proofs: list[Any], damaged: bytes
) -> None:
    Verdicts({}, tmp_path).of(llama)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damaged)
    assert Verdicts({}, tmp_path).of(copy.deepcopy(llama)).source == "proof"
    assert (len(proofs), path.read_bytes()) == (2, whole)


@pytest.mark.parametrize(
    ("name", "value"),
    [("prefix", 1), ("rows", "yes"), ("limit", -1), ("limit", True), ("why", "x"), ("format", 2), ("key", "other")],
)
def test_a_record_with_other_fields_is_none(
    tmp_path: Path, llama: Any, name: str, value: object, proofs: list[Any]
) -> None:
    Verdicts({}, tmp_path).of(llama)
    (path,) = tmp_path.iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    assert Verdicts({}, tmp_path).of(copy.deepcopy(llama)).source == "proof"
    assert len(proofs) == 2


def test_a_directory_that_cannot_be_written_is_no_error(tmp_path: Path, llama: Any) -> None:
    (tmp_path / "file").write_text("")
    assert Verdicts({}, tmp_path / "file" / "verdicts").of(llama).prefix


def test_another_size_dtype_or_attention_is_proven_anew(own: Verdicts, llama: Any, proofs: list[Any]) -> None:
    assert own.of(llama) == own.of(llama)
    llama.set_attn_implementation("eager")
    assert own.of(llama).source == "proof"
    llama.to(HALF)
    assert own.of(llama).source == "proof"
    assert own.of(small_model("llama", num_hidden_layers=1)).source == "proof"
    assert len(proofs) == 4


# --- what it is filed under -------------------------------------------------------------------------------------------


def test_sizes_are_no_part_of_the_digest(llama: Any) -> None:
    other = small_model("llama", hidden_size=64, num_hidden_layers=1, tie_word_embeddings=True, rms_norm_eps=1e-5)
    assert digest_of(llama) == digest_of(other)
    assert digest_of(llama) != digest_of(small_model("mistral", sliding_window=None))
    windows = [small_model("mistral", sliding_window=window) for window in (None, 16, 4096)]
    assert len({*map(digest_of, windows)}) == 2


def test_a_patched_class_is_another_model(own: Verdicts, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before, digest = own.of(llama), digest_of(llama)
    plain = modeling_llama.LlamaAttention.forward

    def patched(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out, weights = plain(self, hidden_states, *args, **kwargs)
        return out + hidden_states.mean(1, keepdim=True), weights

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", patched)
    assert digest_of(llama) != digest
    assert (before.prefix, own.of(llama).why) == (True, Why.FUTURE)
    monkeypatch.undo()
    assert digest_of(llama) == digest


def test_a_module_with_a_forward_of_its_own_is_another_model(own: Verdicts, llama: Any) -> None:
    before, digest = own.of(llama), digest_of(llama)
    attention = llama.model.layers[1].self_attn

    def patched(hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        out, weights = type(attention).forward(attention, hidden_states, **kwargs)
        return out + hidden_states.mean(1, keepdim=True), weights

    attention.forward = patched
    assert digest_of(llama) != digest
    assert (before.prefix, own.of(llama).why) == (True, Why.FUTURE)


def test_the_directory_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AGNOSTIC_CACHE_DIR", str(tmp_path))
    assert verdicts.default_directory() == tmp_path / "verdicts"
    monkeypatch.delenv("AGNOSTIC_CACHE_DIR")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert verdicts.default_directory() == tmp_path / "agnostic-cache" / "verdicts"
