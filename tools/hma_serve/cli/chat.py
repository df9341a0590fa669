"""`hma-serve chat`: a conversation in the terminal.

Ctrl-C stops what is going on (an answer, a line being typed) and never the program; Ctrl-D and /quit end it. A turn
that failed is forgotten, so that it can be asked again; one that was stopped stays as far as it was read.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hma_serve.cli.asking import (
    EXIT_STATUSES,
    add_sampling_flags,
    add_server_flags,
    open_client,
    run,
    sampling_options,
    sentence,
)
from hma_serve.cli.line_input import history_path, line_editing, read_message
from hma_serve.client import Client, HmaError, Message, Options, Stream


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="hma-serve chat",
        description="Talk to a model. With input from a pipe, each line is a message and only answers are printed.",
        epilog=EXIT_STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    parser.add_argument("--stats", action="store_true", help="tell tokens per second after each answer")
    parser.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="ask a model that can think aloud to do so, or not to (default: the model's)",
    )
    add_sampling_flags(parser)
    add_server_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if sys.stdin is None:
        parser.error("stdin is closed")
    return run(parser.prog, lambda: converse(args, interactive=sys.stdin.isatty()))


def converse(args: argparse.Namespace, *, interactive: bool) -> int:
    """Takes messages until there are no more. A person is told of a failure and goes on, a pipe ends with it."""
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # a text file, as it came
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(open_client(args))
        chat = Chat(client, sampling_options(args), thinking=args.thinking, system=args.system, stats=args.stats)
        if interactive:
            chat.greet()
            stack.enter_context(line_editing(history_path()))
        while True:
            try:
                message = read_message(interactive=interactive)
                if message is None or not chat.take(message):
                    return 0
            except KeyboardInterrupt:
                if not interactive:
                    raise
                print(flush=True)  # the terminal has shown ^C
            except HmaError as error:
                if not interactive:
                    raise
                note(sentence(error))


def note(text: str) -> None:
    """Tells the person something that is no answer."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Chat:
    """A conversation and the commands that change it.

    Attributes:
        client: Whom to ask.
        options: For every answer.
        thinking: Whether the template is told to let the model think; None: it is told nothing.
        system: What the model is told first; None: nothing.
        stats: Whether each answer is followed by its speed.
        turns: What was said, oldest first.
    """

    client: Client
    options: Options
    thinking: bool | None = None
    system: str | None = None
    stats: bool = False
    turns: list[Message] = field(default_factory=list)

    def greet(self) -> None:
        """Says who answers; raises HmaError when nobody does."""
        wanted = self.options.get("model")
        for model in self.client.models():
            if wanted in (None, model.id):
                note(f"{model.id}, {model.max_model_len} tokens of context. /help tells the commands, Ctrl-D leaves.")
                return

    def take(self, message: str) -> bool:
        """Obeys a command or has a message answered; returns whether the conversation goes on."""
        if message.startswith("/") and not message.startswith("//"):
            name, _, rest = message[1:].partition(" ")
            return self._obey(name, rest.strip())
        if message.strip():
            self.answer(message.removeprefix("/"))
        return True

    def answer(self, text: str) -> None:
        """Has a message answered and remembers both; raises HmaError."""
        question: Message = {"role": "user", "content": text}
        speed = Speed(time.monotonic())
        with self.client.chat([*self._opening(), *self.turns, question], **self._arguments()) as stream:
            try:
                show(stream, speed)
            except KeyboardInterrupt:
                self._remember(question, stream.text)
                raise
        self._remember(question, stream.text)
        if self.stats:
            note(speed.line())

    def _remember(self, question: Message, answer: str) -> None:
        if answer:
            self.turns += [question, {"role": "assistant", "content": answer}]

    def _arguments(self) -> dict[str, Any]:
        template = None if self.thinking is None else {"enable_thinking": self.thinking}
        return {"template_kwargs": template, **self.options}

    def _opening(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _obey(self, name: str, rest: str) -> bool:
        if name in ("quit", "exit"):
            return False
        command = COMMANDS.get(name)
        if command is None:
            note(f"there is no /{name}; /help tells the commands")
        else:
            command.run(self, rest)
        return True

    def reset(self, _: str) -> None:
        """Forgets what was said."""
        self.turns.clear()
        note("(a new conversation)")

    def instruct(self, text: str) -> None:
        """Replaces the system message and starts anew; without a text, tells the present one."""
        if not text:
            note(self.system or "(no system message)")
            return
        self.system = text
        self.reset("")

    def toggle_stats(self, _: str) -> None:
        """Switches the line about speed."""
        self.stats = not self.stats
        note(f"(speed is {'shown' if self.stats else 'not shown'} after each answer)")

    def help(self, _: str) -> None:
        """Lists the commands."""
        width = max(len(command.usage) for command in COMMANDS.values())
        for command in COMMANDS.values():
            note(f"  {command.usage:{width}}  {command.summary}")
        note(f"  {'/quit':{width}}  leave; so does Ctrl-D")
        note("Ctrl-C stops an answer. A line that ends in \\ goes on in the next; //text sends /text.")


@dataclass(frozen=True)
class Command:
    """One of the commands that start with a slash.

    Attributes:
        usage: As it is typed.
        summary: What it does.
        run: Does it, given the rest of the line.
    """

    usage: str
    summary: str
    run: Callable[[Chat, str], None]


COMMANDS = {
    "help": Command("/help", "tell the commands", Chat.help),
    "reset": Command("/reset", "start a new conversation", Chat.reset),
    "system": Command("/system TEXT", "tell the model something first, in a new conversation", Chat.instruct),
    "stats": Command("/stats", "show or hide the speed of answers", Chat.toggle_stats),
}


@dataclass
class Speed:
    """When the tokens of an answer came.

    Attributes:
        asked: Monotonic seconds at which the question was sent.
        first: At which the first token came; None: none has.
        last: At which the last came.
        tokens: How many came.
    """

    asked: float
    first: float | None = None
    last: float = 0.0
    tokens: int = 0

    def count(self, tokens: int, now: float) -> None:
        """Takes note of tokens that came now."""
        if self.first is None and tokens:
            self.first = now
        self.last = now
        self.tokens += tokens

    def line(self) -> str:
        """Tokens, time to the first, and the rate after it."""
        if self.first is None:
            return "(no tokens)"
        parts = [f"{self.tokens} tokens", f"{self.first - self.asked:.2f} s to the first"]
        if self.last > self.first:
            parts.append(f"{(self.tokens - 1) / (self.last - self.first):.1f} tokens/s after it")
        return f"({', '.join(parts)})"


def show(stream: Stream, speed: Speed) -> None:
    """Writes an answer as it comes and ends its line."""
    for delta in stream:
        speed.count(len(delta.token_ids), time.monotonic())
        sys.stdout.write(delta.text)
        sys.stdout.flush()
    print(flush=True)
