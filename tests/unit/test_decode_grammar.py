"""Structured output: whatever the model would say, the text follows the form that was asked for."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import jsonschema
import pytest
import torch

from hma_serve.checkpoint import read_eos_token_ids, resolve_checkpoint
from hma_serve.core.errors import HmaError, InvalidArgument, ResourceExhausted
from hma_serve.core.request import SamplingParams, StopConditions, Structure, StructureKind
from hma_serve.decode.grammar import COMPILE_SECONDS, Grammar, GrammarCompiler, GrammarQueue
from hma_serve.decode.pages import Reservation
from hma_serve.decode.sampler import sample
from hma_serve.decode.sampling_batch import SamplingBatches
from hma_serve.decode.sequence import Ending, Sequence
from hma_serve.text import Tokenizer
from support.qwen3 import write_qwen3_text_files

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "kind": {"enum": ["cat", "dog", "bird"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 40},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "weight": {"anyOf": [{"type": "null"}, {"type": "number", "minimum": 0, "maximum": 9}]},
    },
    "required": ["name", "kind", "age", "tags"],
    "additionalProperties": False,
}


class Model:
    """A tokenizer, and logits that mean nothing."""

    def __init__(self, checkpoint: Path, vocab: int, eos: tuple[int, ...]) -> None:
        self.vocab = vocab
        self.eos = eos
        self.tokenizer = Tokenizer.from_directory(checkpoint)
        self.compiler = GrammarCompiler(checkpoint, vocab, eos)

    def grammar(self, structure: Structure) -> Grammar:
        grammar = self.compiler.grammar(self.compiler.compile(structure).result())
        grammar.begin([])
        return grammar

    def sequence(
        self, structure: Structure, seed: int, *, stop: StopConditions, max_tokens: int = 400, **params: Any
    ) -> Sequence:
        return Sequence(
            stream=seed,
            pages=cast(Reservation, None),
            prompt_tokens=1,
            tokens=[5],
            computed=1,
            sampling=SamplingParams(**{"temperature": 1.0, **params}),
            seed=seed,
            stop=stop,
            eos=frozenset(self.eos),
            max_tokens=max_tokens,
            vocab=self.vocab,
            guide=self.grammar(structure),
        )

    def write(
        self, structure: Structure, seeds: range, stop: StopConditions | None = None, **params: Any
    ) -> list[tuple[str, Ending | None]]:
        """Draws a text for each seed, all in one batch."""
        stop = StopConditions() if stop is None else stop
        everyone = [self.sequence(structure, seed, stop=stop, **params) for seed in seeds]
        endings: dict[int, Ending | None] = {}
        batches = SamplingBatches(self.vocab, len(everyone))
        noise, step = 4 * torch.randn(self.vocab, generator=torch.Generator().manual_seed(1)), 0
        while running := [each for each in everyone if each.stream not in endings]:
            step += 1
            logits = torch.stack([noise.roll(7919 * step + 104729 * each.stream) for each in running])
            drawn = sample(logits, batches.rows(running), batches.inputs(running), batches.occurrences)
            for sequence, token in zip(running, drawn.tokens.tolist(), strict=True):
                ending = sequence.accept(token)
                if ending is not None:
                    endings[sequence.stream] = ending
                    batches.leave(sequence)
        return [(self.tokenizer.decode(each.tokens[1:]), endings[each.stream]) for each in everyone]


@pytest.fixture(scope="module")
def demo() -> Iterator[Model]:
    checkpoint = resolve_checkpoint("demo")
    model = Model(checkpoint, 4096, read_eos_token_ids(checkpoint))
    yield model
    model.compiler.close()


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    # The model's vocabulary is padded beyond the tokenizer's, as Qwen3's is.
    model = Model(write_qwen3_text_files(tmp_path_factory.mktemp("qwen3")), 151936, (151645, 151643))
    yield model
    model.compiler.close()


@pytest.mark.parametrize("name", ["demo", "qwen3"])
def test_output_of_twenty_seeds_validates(name: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(name)
    texts = model.write(Structure.json_schema(SCHEMA), range(20))
    for text, ending in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
        assert ending is Ending.STOP
    assert len({text for text, _ in texts}) == 20


@pytest.mark.parametrize("name", ["demo", "qwen3"])
def test_expressions_and_choices_are_followed_to_the_letter(name: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(name)
    pattern = r"[a-f]{2,4}-([0-9]{3}|ö{1,3})\."
    for text, _ in model.write(Structure.regex(pattern), range(10)):
        assert re.fullmatch(pattern, text), text
    choices = ["yes", "no", 'a "quoted" one', "back\\slash\nand line", "é"]
    said = {text for text, _ in model.write(Structure.choice(choices), range(40))}
    assert said == set(choices)


UNIQUE: dict[str, Any] = {"name": "unique", "parameters": {"uniqueItems": True}}
FUNCTIONS: list[dict[str, Any]] = [
    {
        "name": "adopt",
        "parameters": {
            "type": "object",
            "properties": {"kind": {"$ref": "#/$defs/kind"}, "age": {"type": "integer", "minimum": 0, "maximum": 40}},
            "required": ["kind", "age"],
            "additionalProperties": False,
            "$defs": {"kind": {"enum": ["cat", "<dog>"]}},
        },
    },
    {"name": 'the "other" one', "parameters": {"properties": {}, "additionalProperties": False}},
]


def called(text: str) -> list[str]:
    """The names in a text that is valid calls and nothing else."""
    assert re.fullmatch(r"(?s)<tool_call>\n.*\n</tool_call>", text), text
    names = []
    for call in text[len("<tool_call>\n") : -len("\n</tool_call>")].split("\n</tool_call>\n<tool_call>\n"):
        made = json.loads(call)
        assert list(made) == ["name", "arguments"]
        [function] = [each for each in FUNCTIONS if each["name"] == made["name"]]
        jsonschema.validate(made["arguments"], function["parameters"])
        names.append(made["name"])
    return names


@pytest.mark.parametrize("name", ["demo", "qwen3"])
def test_calls_are_calls_whatever_the_model_would_say(name: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(name)
    thinking = model.tokenizer.encode("<think>")
    # A model of noise that began to think would never stop.
    bias = {thinking[0]: -100.0} if len(thinking) == 1 else {}
    for one in (True, False):
        texts = model.write(Structure.tool_calls(FUNCTIONS, one=one), range(12), logit_bias=bias)
        made = [called(text) for text, ending in texts if ending is Ending.STOP]
        assert len(made) == 12
        assert {each for names in made for each in names} == {each["name"] for each in FUNCTIONS}
        assert ({len(names) for names in made} == {1}) == one


def test_a_model_with_marks_for_thoughts_may_think_before_it_calls(qwen3: Model, demo: Model) -> None:
    structure = Structure.tool_calls([{"name": "f"}])
    call = '<tool_call>\n{"name": "f", "arguments": {"a": [1]}}\n</tool_call>'
    for text in (call, f"<think>\nWhy <not>?\n</think>\n\n{call}\n{call}"):
        grammar = qwen3.grammar(structure)
        for token in [*qwen3.tokenizer.encode(text), qwen3.eos[0]]:
            grammar.allowed()
            ended = grammar.take(token)
        assert ended
    with pytest.raises(InvalidArgument, match="emitted before"):
        demo.compiler.grammar(demo.compiler.compile(structure).result()).begin(demo.tokenizer.encode("<th"))


def test_a_choice_may_have_the_models_marks(qwen3: Model) -> None:
    for choices in (["<tool_call> a"], ["<tool_call> a", "<think>", "<b>"]):
        assert {text for text, _ in qwen3.write(Structure.choice(choices), range(12))} == set(choices)


def test_any_object_is_an_object(demo: Model) -> None:
    for text, ending in demo.write(Structure.json_object(), range(10), max_tokens=60):
        if ending is Ending.STOP:
            assert isinstance(json.loads(text), dict)


def test_min_tokens_and_ignored_ends_do_not_break_the_form(demo: Model) -> None:
    stop = StopConditions(min_tokens=6, ignore_eos=True)
    for text, ending in demo.write(Structure.regex("[ab]{1,30}"), range(10), stop):
        assert re.fullmatch("[ab]{1,30}", text)
        assert ending is Ending.STOP
    # A form that can only end earlier does.
    assert {text for text, _ in demo.write(Structure.choice(["no"]), range(2), stop)} == {"no"}


def test_logprobs_stay_the_models_own(demo: Model) -> None:
    sequence = demo.sequence(Structure.choice(["yes"]), 1, stop=StopConditions(), logprobs=2, temperature=0.0)
    batches = SamplingBatches(demo.vocab, 1)
    logits = torch.randn(1, demo.vocab)
    wanted = logits.log_softmax(-1)
    drawn = sample(logits, batches.rows([sequence]), batches.inputs([sequence]), batches.occurrences)
    assert drawn.top_tokens is not None
    assert drawn.top_tokens[0].tolist() == wanted[0].topk(2).indices.tolist()
    assert demo.tokenizer.decode(drawn.tokens.tolist())[0] == "y"


def test_a_later_attempt_goes_on_where_the_first_stopped(demo: Model) -> None:
    compiled = demo.compiler.compile(Structure.choice(["yes", "yellow"])).result()
    grammar = demo.compiler.grammar(compiled)
    grammar.begin(demo.tokenizer.encode("ye"))
    grammar.allowed()
    assert not grammar.take(demo.tokenizer.encode("l")[0])
    with pytest.raises(InvalidArgument, match="emitted before"):
        demo.compiler.grammar(compiled).begin(demo.tokenizer.encode("no"))


class Overwhelmed:
    """A matcher that takes tokens and then cannot say what may follow."""

    def consume_token(self, token: int) -> bool:
        return True

    def is_stopped(self) -> bool:
        return False

    def unsafe_compute_mask_ptr(self, pointer: int, size: int) -> None:
        """Leaves the mask empty."""

    def is_error(self) -> bool:
        return True

    def get_error(self) -> str:
        return "too many states"


def test_a_grammar_that_fails_in_a_step_ends_its_own_sequence_alone(demo: Model) -> None:
    """Whatever is drawn for it, an end of the text included, is an error; the others' draws are what they would be."""
    healthy = demo.sequence(Structure.choice(["yes"]), 1, stop=StopConditions(), temperature=0.0)
    with ThreadPoolExecutor(1) as threads:
        for best in (40, demo.eos[0]):
            doomed = demo.sequence(Structure.choice(["no"]), 2, stop=StopConditions(), temperature=0.0)
            doomed.guide = guide = Grammar(cast(Any, Overwhelmed()), demo.vocab, threads)
            guide.begin([])
            batches = SamplingBatches(demo.vocab, 2)
            logits = torch.zeros(2, demo.vocab)
            logits[:, best] = 10.0
            both = [doomed, healthy]
            drawn = sample(logits, batches.rows(both), batches.inputs(both), batches.occurrences).tokens.tolist()
            assert drawn[0] == best
            assert demo.tokenizer.decode(drawn[1:])[0] == "y"
            with pytest.raises(InvalidArgument, match="cannot be followed any further: too many states"):
                doomed.accept(drawn[0])
            assert doomed.output_tokens == 0


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (Structure.json_schema({"type": "objec"}), "Invalid type: objec"),
        (Structure.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (Structure.json_schema({"$ref": "http://example.org/x"}), "does not fetch"),
        (Structure.json_schema({"type": "string", "pattern": "(?=a)"}), "look-around"),
        (Structure.regex("(a|b"), "unclosed group"),
        (Structure.tool_calls([{"name": "f"}, UNIQUE]), "the function 'unique' cannot be followed: .*uniqueItems"),
        (Structure.tool_calls([UNIQUE, {"name": "f"}], one=True), "the function 'unique' cannot"),
    ],
)
def test_what_cannot_be_followed_says_why(demo: Model, structure: Structure, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        demo.compiler.compile(structure).result()
    assert caught.value.field == "structure"
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "make",
    [
        lambda: Structure.json_schema("{"),
        lambda: Structure.json_schema("[1]"),
        lambda: Structure.json_schema("[" * 100_000),
        lambda: Structure.json_schema(cast(Any, {"a": object()})),
        lambda: Structure.json_schema({"description": "x" * 300_000}),
        lambda: Structure.regex(""),
        lambda: Structure.choice([]),
        lambda: Structure.choice([""]),
        lambda: Structure.tool_calls([]),
        lambda: Structure.tool_calls([{}]),
        lambda: Structure.tool_calls([{"name": ""}]),
        lambda: Structure.tool_calls([{"name": "f", "parameters": [1]}]),
        lambda: Structure.tool_calls([{"name": "f", "parameters": {"a": object()}}]),
        lambda: Structure.tool_calls([{"name": "f", "parameters": {"type": "string"}}]),
        lambda: Structure(StructureKind.TOOL_CALL, ("{",)),
        lambda: Structure(StructureKind.TOOL_CALLS, ('{"name": "f"}', "[]")),
        lambda: Structure.choice(str(number) for number in range(5000)),
    ],
)
def test_what_is_no_structure_is_refused_where_it_is_made(make: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        make()
    assert caught.value.field == "structure"


def test_structures_survive_the_wire() -> None:
    for structure in (
        Structure.json_schema(SCHEMA),
        Structure.json_object(),
        Structure.regex("a+"),
        Structure.choice(["a", "b"]),
        Structure.tool_calls(FUNCTIONS),
        Structure.tool_calls(FUNCTIONS, one=True),
    ):
        assert Structure.from_proto(structure.to_proto()) == structure
        assert SamplingParams.from_proto(SamplingParams(structure=structure).to_proto()).structure == structure


def test_grammars_are_compiled_once_and_few_are_kept(demo: Model) -> None:
    compiler = GrammarCompiler(resolve_checkpoint("demo"), 4096, (2,))
    first = compiler.compile(Structure.regex("a{1}"))
    assert compiler.compile(Structure.regex("a{1}")) is first
    for number in range(2, 200):
        compiler.compile(Structure.regex(f"a{{{number}}}")).result()
    assert compiler.compile(Structure.regex("a{1}")) is not first
    assert len(compiler._compiled) <= 128
    compiler.close()


class Endless:
    """A compiler that does not come to an end."""

    def compile(self, structure: Structure) -> Future[Any]:
        return Future()


def test_waiting_for_a_grammar_is_bounded_in_time_and_number() -> None:
    queue = GrammarQueue(cast(GrammarCompiler, Endless()), 2)
    queue.add(1, Structure.regex("a"), now=10.0)
    queue.add(2, Structure.regex("a"), now=11.0)
    with pytest.raises(ResourceExhausted):
        queue.add(3, Structure.regex("a"), now=11.0)
    assert queue.take_ready(now=10.5) == []
    ((number, error),) = queue.take_ready(now=10.0 + COMPILE_SECONDS)
    assert number == 1
    assert isinstance(error, HmaError)
    assert "within 10 s" in error.message
    queue.drop(2)
    queue.drop(2)
    assert queue.take_ready(now=100.0) == []
