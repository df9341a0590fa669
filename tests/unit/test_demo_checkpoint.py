"""The model that ships: small enough, readable by us and by transformers alike, and able to write words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from hma_serve.checkpoint import read_eos_token_ids, read_model_config, resolve_checkpoint
from hma_serve.model import CausalAttention, Transformer, open_weights
from hma_serve.train_demo.evaluate import greedy
from hma_serve.train_demo.vocabulary import load_tokenizer

MAX_BYTES = 16_000_000
_COMMON = """
    a about again all and any are as at be been before but by came can come could day did do down eyes face few for
    from gave go good great had hand hands have he head her him his house how i if in into is it its know last life
    light like little long looked lord made man many may me men might more morning most mr mrs much must my never
    night no not nothing now of off old on once one only or other our out over own people place room said same saw
    say see seemed sea she should sir so some still such sun take than that the their them then there these they
    thing things think this those thought time to too two under up upon us very was way we well went were what when
    where which while white who will wind with without woman words world would year years yes yet you young your
"""
WORDS = frozenset(re.findall("[a-z]+", _COMMON))


@pytest.fixture(scope="module")
def demo() -> Path:
    return resolve_checkpoint("demo")


@pytest.fixture(scope="module")
def model(demo: Path) -> Transformer:
    config = read_model_config(demo)
    return Transformer(config, open_weights(demo, config, dtype=torch.float32))


def test_it_is_small_and_has_the_promised_shape(demo: Path) -> None:
    assert sum(file.stat().st_size for file in demo.iterdir()) <= MAX_BYTES
    config = read_model_config(demo)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (8, 8, 4, 64)
    assert (config.vocab_size, config.max_position_embeddings, config.dtype) == (4096, 4096, "bfloat16")
    assert config.tie_word_embeddings
    assert 7e6 <= config.parameter_count <= 8e6


def test_transformers_computes_the_same_logits(demo: Path, model: Transformer) -> None:
    token_ids = torch.randint(3, 4096, (200,), generator=torch.Generator().manual_seed(0))
    theirs = Qwen3ForCausalLM.from_pretrained(demo, dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(token_ids[None]).logits[0]
        ours = model.logits(model.forward(token_ids, torch.arange(200), CausalAttention(8)))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_the_tokenizer_gives_back_any_text_and_ends_turns(demo: Path) -> None:
    tokenizer = load_tokenizer(demo)
    text = "It's 1851 -- naïve \n\n  日本語 🐋\tend"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() == 4096
    assert [tokenizer.id_to_token(token) for token in read_eos_token_ids(demo)] == ["<|im_end|>", "<|endoftext|>"]


def test_transformers_reads_the_tokenizer_and_the_chat_template(demo: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(demo)
    assert theirs("Call me Ishmael.").input_ids == load_tokenizer(demo).encode("Call me Ishmael.").ids
    messages = [{"role": "system", "content": "Be polite."}, {"role": "user", "content": "Hello!"}]
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nBe polite.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    )


def test_it_continues_a_sentence_in_words(demo: Path, model: Transformer) -> None:
    tokenizer = load_tokenizer(demo)
    prompt = tokenizer.encode("It was a cold morning in winter, and the old man").ids
    with torch.inference_mode():
        text = tokenizer.decode(greedy(model, prompt, [0] * 40))
    words = re.findall(r"[a-z]+", text.lower())
    assert len(words) >= 20
    assert sum(word in WORDS for word in words) >= len(words) / 2


def test_it_finds_a_fact_and_copies_a_passage_from_its_context(demo: Path, model: Transformer) -> None:
    tokenizer = load_tokenizer(demo)
    facts = "The code of garden is 4831.\nThe code of window is 7205.\nThe code of silver is 1960.\n\n"
    generator = torch.Generator().manual_seed(1)
    passage = torch.randint(3, 4096, (40,), generator=generator).tolist()
    between = tokenizer.encode("The sea was calm, and nobody spoke for a long while. " * 20).ids
    with torch.inference_mode():
        found = greedy(model, tokenizer.encode(facts + "The code of window is").ids, [0] * 5)
        copied = greedy(model, passage + between + passage[:8], passage[8:])
    assert tokenizer.decode(found) == " 7205"
    assert sum(a == b for a, b in zip(copied, passage[8:], strict=True)) >= 31


def test_the_card_states_what_was_trained_and_measured(demo: Path) -> None:
    card = (demo / "README.md").read_text()
    assert "classic_books_core.txt.gz" in card
    assert re.search(r"Steps: \d,\d{3} in all", card)
    assert re.search(r"held-out loss: 0\.\d{4} nats per byte", card)
    assert "license: apache-2.0" in card
    assert f"{read_model_config(demo).parameter_count:,} parameters" in card
    line = r"32 ([\w ]+) copied from 1,000 tokens back after a cue of (\d+): ([\d.]+)% right, on its own ([\d.]+)%"
    copied = {(what, int(cue)): (float(guided), float(alone)) for what, cue, guided, alone in re.findall(line, card)}
    assert copied.keys() == {("tokens of prose", 16), ("random tokens", 16), ("tokens of prose", 8)}
    for what in ("tokens of prose", "random tokens"):
        guided, alone = copied[what, 16]
        assert guided >= 95
        assert alone >= 90
    found = re.search(r"look-up among 20 distractors: ([\d.]+)% exact", card)
    assert found is not None
    assert float(found[1]) >= 80
