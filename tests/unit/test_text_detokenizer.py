"""Tokens become text incrementally, exactly as in one go."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HfTokenizer

from hma_serve.core.errors import FailedPrecondition, InvalidArgument, NotFound
from hma_serve.text import Tokenizer

CORPUS = [
    "the quick brown fox",
    "über straße naïve",
    "人工智能 自然语言",
    "👩‍👩‍👧‍👦 🇩🇪 ❤️‍🔥",
    "  \n\n\t",
    "ﷺ नमस्ते Ω≈ç√",
] * 4
# "é" stands for one byte in the vocabulary's alphabet: an added token of that name decodes to half a character.
ODD_TOKENS = ["é", "two words", "漢字"]


def train(*added: str) -> HfTokenizer:
    """A byte-level BPE whose merges cut through characters."""
    tokenizer = HfTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    return tokenizer


REFERENCE = train()
TOKENIZER = Tokenizer(REFERENCE.to_str())
ODD_REFERENCE = train(*ODD_TOKENS)
ODD = Tokenizer(ODD_REFERENCE.to_str())

token_lists = st.lists(st.integers(0, ODD.size + 3), max_size=40)


def test_the_vocabulary_cuts_characters() -> None:
    ids = TOKENIZER.encode("人工智能")
    assert any("\ufffd" in TOKENIZER.decode([token_id]) for token_id in ids)


@settings(deadline=None)
@given(st.text())
def test_text_survives_the_round_trip(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text), skip_special=False) == text


@settings(deadline=None)
@given(st.text())
def test_encoding_is_the_librarys(text: str) -> None:
    assert TOKENIZER.encode(text) == REFERENCE.encode(text).ids


@settings(deadline=None)
@given(token_lists, st.booleans())
def test_decoding_is_the_librarys_for_any_tokens(ids: list[int], skip: bool) -> None:
    known = [token_id for token_id in ids if token_id < ODD.size]
    assert ODD.decode(ids, skip_special=skip) == ODD_REFERENCE.decode(known, skip_special_tokens=skip)


@settings(deadline=None)
@given(token_lists, st.data())
def test_any_split_gives_the_one_shot_text(ids: list[int], data: st.DataObject) -> None:
    detokenizer = ODD.detokenizer()
    pieces = []
    position = 0
    while position < len(ids):
        step = data.draw(st.integers(1, len(ids) - position))
        pieces.append(detokenizer.push_all(ids[position : position + step]))
        position += step
    assert "".join(pieces) + detokenizer.finish() == ODD.decode(ids)


@settings(deadline=None)
@given(st.text())
def test_no_piece_of_valid_text_has_a_replacement_character(text: str) -> None:
    text = text.replace("\ufffd", "")
    detokenizer = TOKENIZER.detokenizer(skip_special=False)
    pieces = [detokenizer.push(token_id) for token_id in TOKENIZER.encode(text)]
    assert detokenizer.finish() == ""
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_is_held_back_and_then_replaced() -> None:
    ids = TOKENIZER.encode("Ω")
    detokenizer = TOKENIZER.detokenizer()
    assert [detokenizer.push(token_id) for token_id in ids[:-1]] == [""] * (len(ids) - 1)
    assert detokenizer.finish() == "\ufffd"


def test_special_tokens_have_no_text_unless_asked_for() -> None:
    ids = TOKENIZER.encode("a<|end|>b")
    assert TOKENIZER.decode(ids) == "ab"
    assert TOKENIZER.decode(ids, skip_special=False) == "a<|end|>b"
    assert TOKENIZER.special_ids == {REFERENCE.token_to_id("<|end|>")}


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="surrogate") as raised:
        TOKENIZER.encode("a\ud800")
    assert raised.value.field == "prompt"


def test_truncation_and_padding_of_the_file_are_ignored() -> None:
    cut = train()
    cut.enable_truncation(2)
    cut.enable_padding(length=8)
    assert Tokenizer(cut.to_str()).encode("the quick brown fox") == TOKENIZER.encode("the quick brown fox")


@pytest.mark.parametrize(
    "definition", ["", "[]", "{}", '{"decoder": null}', "[" * 100_000, '{"decoder": {"type": "ByteLevel"}}']
)
def test_a_broken_definition_is_refused(definition: str) -> None:
    with pytest.raises(FailedPrecondition, match=r"tokenizer\.json"):
        Tokenizer(definition)


def test_another_kind_of_decoder_is_refused_by_name() -> None:
    other = train()
    other.decoder = decoders.Metaspace()
    with pytest.raises(FailedPrecondition, match="Metaspace"):
        Tokenizer(other.to_str())


def test_a_directory_without_a_tokenizer_is_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("model")
    with pytest.raises(NotFound, match=r"tokenizer\.json"):
        Tokenizer.from_directory(directory)
    (directory / "tokenizer.json").write_text(REFERENCE.to_str())
    assert Tokenizer.from_directory(directory).size == REFERENCE.get_vocab_size()
    (directory / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(FailedPrecondition, match="UTF-8"):
        Tokenizer.from_directory(directory)
