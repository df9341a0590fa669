"""The demo's trainer in its parts: what is held out, what is learned from, how a step is made, what is written."""

from __future__ import annotations

import gzip
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hma_serve.checkpoint import read_eos_token_ids, read_model_config
from hma_serve.core.errors import FailedPrecondition, InvalidArgument
from hma_serve.core.model_config import ModelConfig
from hma_serve.model import CausalAttention, Transformer, open_weights, tensor_shapes
from hma_serve.train_demo.batches import COPY_WEIGHT, IGNORED, BatchSource, Prepared, TaskStream, encode_texts
from hma_serve.train_demo.card import Run, read_runs, write_card
from hma_serve.train_demo.corpus import normalise, read_corpus
from hma_serve.train_demo.evaluate import greedy
from hma_serve.train_demo.export import write_checkpoint
from hma_serve.train_demo.muon import Muon, orthogonalised
from hma_serve.train_demo.parameters import Parameters
from hma_serve.train_demo.repeats import Repeats
from hma_serve.train_demo.scores import Copying, Scores
from hma_serve.train_demo.tasks import Passages, TaskWriter
from hma_serve.train_demo.training import Schedule
from hma_serve.train_demo.vocabulary import SPECIAL_TOKENS, train_tokenizer
from hma_serve.train_demo.widen import initial_weights, widened, widened_config
from support.tiny_qwen3 import tiny_tokenizer

CONFIG = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    dtype="bfloat16",
)
CPU = torch.device("cpu")


def prose(paragraphs: int) -> str:
    r = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(r.choices(letters, k=r.randint(4, 9))) for _ in range(400)]

    def sentence() -> str:
        return " ".join(r.choices(words, k=r.randint(6, 14))).capitalize() + "."

    return "\n\n".join(" ".join(sentence() for _ in range(4)) for _ in range(paragraphs))


PASSAGES = Passages.of([prose(200)])


def test_held_out_sections_are_disjoint_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "\n\n".join(f"{number:07} " + "x" * 1000 for number in range(5000))
    path = tmp_path / "corpus.txt.gz"
    path.write_bytes(gzip.compress(text.encode(), 1))
    corpus = read_corpus(path)
    pieces = sorted(corpus.train + corpus.held_out, key=lambda section: section[:7])
    assert "".join(pieces) == text
    assert len(corpus.held_out) == 1
    assert not {s[:7] for s in corpus.held_out} & {s[:7] for s in corpus.train}


@pytest.mark.parametrize(
    ("content", "message"), [(b"short", "too short"), (b"\xff\xfe", "cannot read"), (None, "cannot read")]
)
def test_an_unusable_corpus_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidArgument, match=message):
        read_corpus(path)


def test_text_is_made_uniform() -> None:
    assert normalise("“It’s  _so_”\r\n\n\n\nnext \n line") == '"It\'s so"\n\nnext\nline'


def test_the_learned_tokenizer_is_reversible_and_has_the_asked_size() -> None:
    tokenizer = train_tokenizer([prose(300)], vocabulary=500)
    assert tokenizer.get_vocab_size() == 500
    assert [tokenizer.id_to_token(index) for index in range(3)] == list(SPECIAL_TOKENS)
    text = "naïve 4831\n\n  \t— 日本語 it's"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("4831").ids) == 4


def test_only_what_can_be_known_is_learned() -> None:
    tokenizer = tiny_tokenizer(320)
    texts = [TaskWriter(PASSAGES, seed).text() for seed in range(30)]
    stream = encode_texts(tokenizer, texts)
    bounds = [*stream.starts.tolist(), len(stream.tokens)]
    for segments, begin, end in zip(texts, bounds, bounds[1:], strict=False):
        tokens, learned = stream.tokens[begin:end], stream.learned[begin:end]
        assert tokenizer.decode(tokens.tolist(), skip_special_tokens=False) == "".join(text for text, _ in segments)
        expected = "".join(text for text, can_be_learned in segments if can_be_learned)
        assert tokenizer.decode(tokens[learned].tolist(), skip_special_tokens=False) == expected


def test_texts_repeat_with_their_seed_only() -> None:
    assert TaskWriter(PASSAGES, 1).text() == TaskWriter(PASSAGES, 1).text()
    assert TaskWriter(PASSAGES, 1).text() != TaskWriter(PASSAGES, 2).text()


def test_a_lookup_states_its_answer_once_among_the_distractors() -> None:
    writer = TaskWriter(PASSAGES, 0)
    for _ in range(20):
        task = writer.lookup()
        value = task.answer.strip().removesuffix("<|im_end|>")
        facts = task.prompt.removeprefix("<|im_start|>user\n").split("\n\n")[0].splitlines()
        assert len(facts) == 21
        assert any(fact.rstrip(".").endswith(value) for fact in facts)


@pytest.mark.parametrize("length", [512, 2048])
def test_every_label_continues_the_book_or_was_seen_before_in_its_row(length: int) -> None:
    books = (np.arange(100_000) % 4000).astype(np.uint16)
    tasks = TaskStream(np.full(10_000, 7, np.uint16), np.zeros(10_000, np.bool_), np.arange(0, 5_000, 100))
    batch = BatchSource(books, tasks, vocabulary=4096, device=CPU, seed=0).draw(40, length)
    assert batch.ids.shape == batch.labels.shape == batch.weights.shape == (40, length)
    repeated_rows = 0
    for row, targets, weights in zip(batch.ids.tolist(), batch.labels.tolist(), batch.weights.tolist(), strict=True):
        heavy = sum(
            weight == COPY_WEIGHT and target != IGNORED for weight, target in zip(weights, targets, strict=True)
        )
        for index, (target, weight) in enumerate(zip(targets, weights, strict=True)):
            if target != IGNORED:
                assert target in row[:index] if weight == COPY_WEIGHT else target == (row[index] + 1) % 4000
        repeated_rows += heavy > length // 20
    assert repeated_rows >= 10
    assert (batch.labels == IGNORED).all(dim=1).sum() == 10  # the task rows, which hold nothing to learn here


def test_repeats_come_from_before_are_marked_and_hold_some_wrong_tokens() -> None:
    rows = torch.arange(2048)[None].repeat(64, 1).int() + 3
    made = Repeats(4096, torch.Generator().manual_seed(0)).into(rows)
    wrong = made.read != made.true
    assert 0.05 < wrong.sum() / made.copied.sum() < 0.15
    assert not (wrong & ~made.copied).any()
    assert 0.1 < made.copied.float().mean() < 0.4
    for row, copied in zip(made.true.tolist(), made.copied.tolist(), strict=True):
        known_from = [index for index, value in enumerate(copied) if value and row[index - 1] == row[index] - 1]
        assert all(row[index] - 3 < index for index in known_from)  # the source of a repetition lies before it
    border = made.copied[:, :-1] & ~made.copied[:, 1:]
    assert not (border & made.known[:, 1:]).any()  # where a repetition ends, nobody can tell


def test_random_tokens_are_learned_only_where_they_come_again() -> None:
    rows = torch.full((64, 2048), 1, dtype=torch.int32)
    made = Repeats(4096, torch.Generator().manual_seed(0)).into(rows)
    noise = made.true != 1
    assert 0.1 < noise.float().mean() < 0.5
    assert (noise & made.copied).any()
    assert not (noise & made.known & ~made.copied).any()


def test_a_widened_model_computes_the_same_and_can_learn_more() -> None:
    weights = {name: 0.1 * torch.randn(shape) for name, shape in tensor_shapes(CONFIG).items()}
    wider = widened_config(CONFIG)
    assert (wider.head_dim, wider.rope_theta) == (32, 1e8)
    grown = {name: tensor.clone().requires_grad_() for name, tensor in widened(weights, CONFIG, seed=0).items()}
    ids = torch.randint(3, 320, (200,))

    def logits(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        model = Transformer(config, tensors)
        return model.logits(model.forward(ids, torch.arange(200), CausalAttention(2)))

    expected, out = logits(CONFIG, weights), logits(wider, grown)
    torch.testing.assert_close(out, expected, atol=5e-3 * float(expected.std()), rtol=0)
    torch.autograd.backward(out.square().mean())
    new_queries = grown["model.layers.0.self_attn.q_proj.weight"].view(2, 2, 2, 8, 32)[:, :, 1]
    assert not new_queries.any()
    gradient = grown["model.layers.0.self_attn.q_proj.weight"].grad
    assert gradient is not None
    assert gradient.view(2, 2, 2, 8, 32)[:, :, 1].any()


def test_training_goes_on_from_the_same_or_the_narrower_model_only(tmp_path: Path) -> None:
    weights = {name: tensor.detach() for name, tensor in Parameters(CONFIG, device=CPU, seed=0).named().items()}
    write_checkpoint(tmp_path, CONFIG, weights, tiny_tokenizer(320), [])
    assert initial_weights(tmp_path, CONFIG, 0).keys() == weights.keys()
    wider = widened_config(CONFIG)
    assert {name: t.shape for name, t in initial_weights(tmp_path, wider, 0).items()} == tensor_shapes(wider)
    with pytest.raises(InvalidArgument, match="another architecture"):
        initial_weights(tmp_path, replace(CONFIG, num_heads=4), 0)


def test_prepared_data_survives_the_disk(tmp_path: Path) -> None:
    stream = encode_texts(tiny_tokenizer(320), [TaskWriter(PASSAGES, seed).text() for seed in range(3)])
    before = Prepared(tiny_tokenizer(320), np.arange(50, dtype=np.uint16), stream, "books.txt", 1234)
    before.save(tmp_path / "data.npz")
    after = Prepared.load(tmp_path / "data.npz")
    assert after.tokenizer.to_str() == before.tokenizer.to_str()
    assert (after.corpus, after.corpus_bytes) == ("books.txt", 1234)
    for name in ("tokens", "learned", "starts"):
        assert np.array_equal(getattr(after.tasks, name), getattr(before.tasks, name))
    assert np.array_equal(after.books, before.books)


def test_muon_steps_are_nearly_orthogonal_and_go_downhill() -> None:
    singular = torch.linalg.svdvals(orthogonalised(torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(0))))
    assert singular.min() > 0.5
    assert singular.max() < 1.4
    weights, target = torch.zeros(2, 8, 8, requires_grad=True), torch.eye(8).expand(2, 8, 8)
    muon = Muon([weights])
    losses = []
    for _ in range(40):
        loss = (weights - target).square().sum()
        weights.grad = None
        torch.autograd.backward(loss)
        muon.step(0.05)
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_the_schedule_rises_stays_and_falls() -> None:
    schedule = Schedule(minutes=1, peak=0.5)
    rates = [schedule.rate(share) for share in (0.0, 0.1, 0.4, 0.75, 0.999)]
    assert rates[0] < rates[1] == rates[2] == 0.5
    assert rates[2] > rates[3] > rates[4] > 0
    assert [schedule.length(share) for share in (0.1, 0.9)] == [1024, 4096]


def test_parameters_are_the_transformers_tensors_and_take_gradients() -> None:
    parameters = Parameters(CONFIG, device=CPU, seed=0)
    named = parameters.named()
    assert {name: tuple(tensor.shape) for name, tensor in named.items()} == tensor_shapes(CONFIG)
    model = Transformer(CONFIG, named)
    logits = model.logits(model.forward(torch.arange(9), torch.arange(9), CausalAttention(2)))
    torch.autograd.backward(logits.square().mean())
    # Output projections start at zero, so at first only they and the embedding can move.
    moved = [stack for stack in parameters.matrices if stack.grad is not None and stack.grad.any()]
    assert [tuple(stack.shape) for stack in moved] == [(2, 32, 32), (2, 32, 48)]
    again = Parameters(CONFIG, device=CPU, seed=1, initial=named).named()
    assert all(torch.equal(again[name], named[name]) for name in named)


def test_the_written_checkpoint_is_read_back_with_its_history(tmp_path: Path) -> None:
    weights = {name: tensor.detach() for name, tensor in Parameters(CONFIG, device=CPU, seed=0).named().items()}
    runs = [Run("books.txt", 2_000_000, "--minutes 8", 1500, 3_000_000, 480.0, "a GPU")] * 2
    write_checkpoint(tmp_path, CONFIG, weights, tiny_tokenizer(320), runs)
    assert read_model_config(tmp_path) == CONFIG
    assert read_eos_token_ids(tmp_path) == (2, 0)
    with open_weights(tmp_path, CONFIG, dtype=torch.bfloat16) as stored:
        assert all(torch.equal(stored[name], tensor.bfloat16()) for name, tensor in weights.items())
    assert read_runs(tmp_path) == runs
    write_card(tmp_path, Scores(0.9, Copying(0.95, 0.5), Copying(1.0, 0.9), Copying(0.9, 0.4), found=0.8, samples=10))
    card = (tmp_path / "README.md").read_text()
    for stated in (
        "Steps: 3,000 in all",
        "held-out loss: 0.9000",
        "95.0% right, on its own 50.0%",
        "80.0%",
        "`books.txt`, 2.0 MB",
    ):
        assert stated in card


def test_history_is_demanded_of_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(FailedPrecondition, match="does not say how it was trained"):
        read_runs(tmp_path)


@pytest.mark.parametrize("right", [0, 1, 4, 9, 10])
def test_greedy_decoding_does_not_depend_on_what_is_expected(right: int) -> None:
    weights = {name: torch.randn(t.shape) for name, t in Parameters(CONFIG, device=CPU, seed=0).named().items()}
    model = Transformer(CONFIG, weights)
    prompt = [5, 6, 7]
    with torch.inference_mode():
        out = greedy(model, prompt, [-1 % CONFIG.vocab_size] * 10)
        hint = out[:right] + [(token + 1) % CONFIG.vocab_size for token in out[right:]]
        assert greedy(model, prompt, hint) == out
    assert len(out) == 10
