"""Generated texts whose answers stand in their own context: look-ups, recitals, and short chats.

Books alone teach a small model to write; they do not teach it to look back a thousand tokens on purpose. These texts
do. Every text is a list of segments, each marked whether it can be learned (an answer, ordinary prose) or is arbitrary
(random facts, what the user says), so that no capacity goes into guessing the unguessable.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hma_serve.train_demo.vocabulary import END_OF_TEXT, TURN_END, TURN_START

Segment = tuple[str, bool]
"""A piece of text and whether its tokens are trained on."""

DISTRACTORS = 20

_NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Ida",
    "Jack",
    "Kate",
    "Leo",
    "Mary",
    "Nora",
    "Oscar",
    "Paul",
    "Rose",
    "Sam",
    "Tom",
    "Una",
    "Victor",
    "Walter",
    "Alice",
    "Bella",
    "Charles",
    "Daisy",
    "Edward",
    "Fanny",
    "George",
    "Harriet",
    "Isaac",
    "Jane",
    "Karl",
    "Lucy",
    "Martin",
    "Nelly",
    "Oliver",
    "Peter",
    "Ruth",
    "Sophie",
]
_KINDS = ["code", "number", "price", "name", "colour", "sign", "secret", "password", "value", "key"]
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_ORDINALS = ["first", "second", "third", "fourth", "fifth"]
_SYSTEMS = ["You are a helpful assistant.", "You are a small and friendly model.", "Answer shortly.", "Be polite."]
_GREETINGS = {
    "Hello!": "Hello! How can I help you?",
    "Hello": "Hello! How can I help you?",
    "Hi": "Hello! What can I do for you?",
    "Hi there!": "Hello! What can I do for you?",
    "Good morning.": "Good morning! How can I help you?",
    "Good evening.": "Good evening! How can I help you?",
    "How are you?": "I am very well, thank you. How are you?",
    "Who are you?": "I am a small model that has read some old books.",
    "What are you?": "I am a small model that has read some old books.",
    "What can you do?": "I can tell you a story, repeat what you say, and remember what you tell me in this talk.",
    "Thank you.": "You are welcome.",
    "Thanks!": "You are welcome.",
    "Goodbye.": "Goodbye! It was a pleasure.",
    "Bye!": "Goodbye! It was a pleasure.",
}


@dataclass(frozen=True, slots=True)
class Passages:
    """Prose to quote from.

    Attributes:
        paragraphs: Paragraphs of moderate length, each as its sentences.
        words: Common lower-case words, for keys and values.
    """

    paragraphs: tuple[tuple[str, ...], ...]
    words: tuple[str, ...]

    @classmethod
    def of(cls, sections: Sequence[str]) -> Passages:
        """Collects paragraphs and words from a sample of the corpus."""
        paragraphs, counts = [], Counter[str]()
        for section in sections:
            counts.update(re.findall(r"\b[a-z]{4,9}\b", section))
            for paragraph in section.split("\n\n"):
                if 80 <= len(paragraph) <= 900 and not paragraph.startswith(("#", "*", "|")):
                    paragraphs.append(tuple(re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph.replace("\n", " ").strip())))
        words = tuple(word for word, _ in counts.most_common(3200)[200:])
        return cls(tuple(paragraphs), words)


@dataclass(frozen=True, slots=True)
class Lookup:
    """A key to find among distractors.

    Attributes:
        prompt: Everything up to where the answer starts.
        answer: The exact continuation.
    """

    prompt: str
    answer: str


class TaskWriter:
    """Writes random task texts; the same seed writes the same texts."""

    def __init__(self, passages: Passages, seed: int) -> None:
        self._passages = passages
        self._random = random.Random(seed)

    def text(self) -> list[Segment]:
        """One complete text, ended by the end-of-text token."""
        kinds: list[Callable[[], list[Segment]]] = [self._lookups, self._recital, self._conversation]
        kind = self._random.choices(kinds, weights=(4, 1, 4))[0]
        return [*kind(), (END_OF_TEXT, True)]

    def lookup(self, distractors: int = DISTRACTORS) -> Lookup:
        """One question about one of `distractors + 1` facts, for evaluation."""
        facts = self._facts(distractors + 1)
        style = self._random.choice(_STYLES)
        key, value = self._random.choice(facts)
        kind = self._random.choice(_KINDS)
        lines = "\n".join(style.state(kind, *fact) for fact in facts)
        if self._random.random() < 0.5:
            return Lookup(f"{lines}\n\n{style.ask(kind, key)}", f" {value}")
        question = f"{lines}\n\n{style.question(kind, key)}"
        return Lookup(f"{_turn('user', question)}{TURN_START}assistant\n", f"{value}{TURN_END}")

    def _facts(self, count: int) -> list[tuple[str, str]]:
        """Pairs with distinct keys; values are words or numbers, alike within one text."""
        r, words = self._random, self._passages.words
        two_words, digits = r.random() < 0.3, r.choice((0, 0, 2, 3, 4, 5))
        keys: set[str] = set()
        while len(keys) < count:
            keys.add(" ".join(r.sample(words, 2)) if two_words else r.choice(words))
        shuffled = r.sample(sorted(keys), count)
        return [
            (key, str(r.randrange(10 ** (digits - 1), 10**digits)) if digits else r.choice(words)) for key in shuffled
        ]

    def _lookups(self) -> list[Segment]:
        """Facts in a block, or scattered through prose, then several questions about them."""
        r = self._random
        facts, style, kind = self._facts(r.randint(2, 30)), r.choice(_STYLES), r.choice(_KINDS)
        scattered = r.random() < 0.35
        segments: list[Segment] = []
        for fact in facts:
            if scattered and r.random() < 0.5:
                segments.append((self._prose(r.randint(1, 2)) + "\n\n", True))
            segments.append((style.state(kind, *fact) + "\n", False))
        for key, value in r.sample(facts, r.randint(1, min(12, len(facts)))):
            if r.random() < 0.2:
                segments.append(("\n" + self._prose(r.randint(1, 6)) + "\n", True))
            segments += [("\n" + style.ask(kind, key), False), (f" {value}", True)]
        return segments

    def _recital(self) -> list[Segment]:
        """A passage to remember, prose in between, then the passage again."""
        r = self._random
        name, passage = r.choice(self._passages.words), self._nonsense() if r.random() < 0.4 else self._prose(1)
        between = self._prose(r.randint(1, 25))
        return [
            (f'Remember the {name} passage: "{passage}"\n\n', False),
            (f"{between}\n\n", True),
            (f'The {name} passage was: "', False),
            (f'{passage}"', True),
        ]

    def _conversation(self) -> list[Segment]:
        r = self._random
        segments: list[Segment] = []
        if r.random() < 0.3:
            segments.append((_turn("system", r.choice(_SYSTEMS)), False))
        skills = [self._greeting, self._story, self._topic, self._repeat, self._list, self._sum, self._told, self._name]
        for _ in range(r.choices((1, 2, 3, 4), weights=(4, 3, 2, 1))[0]):
            for user, assistant in r.choices(skills, weights=(2, 3, 3, 2, 2, 1, 6, 2))[0]():
                segments.append((f"{_turn('user', user)}{TURN_START}assistant\n", False))
                segments += [(f"{assistant}{TURN_END}\n", True)]
        return segments

    def _greeting(self) -> list[tuple[str, str]]:
        return [self._random.choice(list(_GREETINGS.items()))]

    def _story(self) -> list[tuple[str, str]]:
        r = self._random
        if r.random() < 0.5:
            asked = r.choice(("Tell me a story.", "Please tell me a story.", "Write a story.", "Tell me something."))
            return [(asked, self._prose(r.randint(1, 2)))]
        sentences = self._paragraph(least=3)
        cut = r.randint(1, len(sentences) - 1)
        asked = r.choice(("Continue: ", "Go on: ", "What happens next? ", "Continue this story: "))
        return [(asked + " ".join(sentences[:cut]), " ".join(sentences[cut:]))]

    def _topic(self) -> list[tuple[str, str]]:
        r = self._random
        paragraph = self._paragraph(least=1)
        words = [w for sentence in paragraph for w in re.findall(r"\b[a-z]{4,12}\b", sentence)] or ["something"]
        word = r.choice(words)
        asked = r.choice(("Tell me about {}.", "Write about {}.", "Say something about {}.", "Use the word {}."))
        return [(asked.format(word), " ".join(paragraph))]

    def _repeat(self) -> list[tuple[str, str]]:
        r = self._random
        what = self._nonsense() if r.random() < 0.4 else r.choice(self._paragraph(least=1))
        return [(r.choice(("Repeat: ", "Repeat after me: ", "Say this again: ")) + what, what)]

    def _list(self) -> list[tuple[str, str]]:
        r = self._random
        items = r.sample(self._passages.words, r.randint(3, 5))
        pairs = [(ordinal, item) for ordinal, item in zip(_ORDINALS, items, strict=False)] + [("last", items[-1])]
        asked, answer = r.choice(pairs)
        return [(f"Here is a list: {', '.join(items)}. What is the {asked} word?", answer)]

    def _sum(self) -> list[tuple[str, str]]:
        r = self._random
        if r.random() < 0.5:
            a, b = r.randint(0, 9), r.randint(0, 9)
            return [(f"What is {a} + {b}?", str(a + b))]
        n = r.randint(0, 11)
        return [(f"What comes after {_NUMBERS[n]}?", _NUMBERS[n + 1])]

    def _told(self) -> list[tuple[str, str]]:
        """Facts given in one turn and asked for in it or in later ones."""
        r = self._random
        facts, style, kind = self._facts(r.randint(1, 24)), r.choice(_STYLES), r.choice(_KINDS)
        lines = "\n".join(style.state(kind, *fact) for fact in facts)
        (first, value), *others = r.sample(facts, min(len(facts), r.randint(1, 6)))
        if r.random() < 0.3:
            turns = [(lines, r.choice(("I will remember that.", "Thank you, I will remember.")))]
            turns.append((style.question(kind, first), value))
        else:
            turns = [(f"{lines}\n\n{style.question(kind, first)}", value)]
        return turns + [(style.question(kind, key), other) for key, other in others]

    def _name(self) -> list[tuple[str, str]]:
        r = self._random
        name, friend = r.sample(_NAMES, 2)
        turns = [(f"My name is {name}.", f"Hello, {name}! How can I help you?")]
        if r.random() < 0.5:
            turns.append((f"My friend is called {friend}.", f"I will remember {friend}."))
            turns.append(("What is my friend called?", f"Your friend is called {friend}."))
        return [*turns, ("What is my name?", f"Your name is {name}.")]

    def _paragraph(self, least: int) -> tuple[str, ...]:
        while True:
            paragraph = self._random.choice(self._passages.paragraphs)
            if len(paragraph) >= least:
                return paragraph

    def _prose(self, paragraphs: int) -> str:
        """Consecutive paragraphs of one book."""
        known = self._passages.paragraphs
        start = self._random.randrange(max(1, len(known) - paragraphs))
        return "\n\n".join(" ".join(paragraph) for paragraph in known[start : start + paragraphs])

    def _nonsense(self) -> str:
        return " ".join(self._random.choices(self._passages.words, k=self._random.randint(4, 30)))


@dataclass(frozen=True, slots=True)
class _Style:
    """How a fact is stated and asked for; formats over kind (k), key (n) and value (v)."""

    stated: str
    asked: str
    put_as_question: str

    def state(self, kind: str, key: str, value: str) -> str:
        return self.stated.format(k=kind, n=key, v=value)

    def ask(self, kind: str, key: str) -> str:
        return self.asked.format(k=kind, n=key)

    def question(self, kind: str, key: str) -> str:
        return self.put_as_question.format(k=kind, n=key)


_STYLES = (
    _Style("The {k} of {n} is {v}.", "The {k} of {n} is", "What is the {k} of {n}?"),
    _Style("The {k} for {n} is {v}.", "The {k} for {n} is", "What is the {k} for {n}?"),
    _Style("{n}: {v}", "{n}:", "What belongs to {n}?"),
    _Style("{n} = {v}", "{n} =", "What is {n}?"),
    _Style("{n} -> {v}", "{n} ->", "What does {n} lead to?"),
    _Style("{n} has the {k} {v}.", "{n} has the {k}", "Which {k} has {n}?"),
    _Style("The {k} of {n} is {v}.", "Question: What is the {k} of {n}?\nAnswer:", "Tell me the {k} of {n}."),
    _Style("{n}: {v}", "Question: {n}?\nAnswer:", "{n}?"),
)


def _turn(role: str, content: str) -> str:
    return f"{TURN_START}{role}\n{content}{TURN_END}\n"
