"""`hma-serve complete` and `hma-serve chat` as a user meets them: processes, pipes and a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hma_serve.core.errors import InvalidArgument, ResourceExhausted
from support.cluster import command, environment
from support.fake_inference import FakeRouter, eventually

PATIENCE = 20.0


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    with FakeRouter() as router:
        yield router


def run(*arguments: str, stdin: str | bytes = "") -> subprocess.CompletedProcess[str]:
    data = stdin.encode() if isinstance(stdin, str) else stdin
    result = subprocess.run(
        command(*arguments), input=data, capture_output=True, env=environment(), timeout=PATIENCE, check=False
    )
    return subprocess.CompletedProcess(
        result.args, result.returncode, result.stdout.decode(), result.stderr.decode(errors="replace")
    )


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [(["Once upon"], ""), (["-"], "Once upon\n"), ([], "Once upon\n")],
    ids=["argument", "dash", "pipe"],
)
def test_complete_continues_a_prompt(arguments: list[str], stdin: str, router: FakeRouter) -> None:
    result = run("complete", "--address", router.address, "--max-tokens", "3", *arguments, stdin=stdin)
    assert (result.returncode, result.stdout, result.stderr) == (0, " word0 word1 word2\n", "")
    assert router.service.requests[0].text == "Once upon"


def test_complete_passes_its_flags_on_and_prints_json(router: FakeRouter) -> None:
    flags = "--max-tokens 2 --temperature 0.5 --top-p 0.9 --seed 7 --stop END --stop . --model m --timeout 9 --json"
    result = run("complete", "--address", router.address, *flags.split(), "hello there")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {
        "request_id": "req-1",
        "model": "m",
        "text": " word0 word1",
        "token_ids": [0, 1],
        "finish_reason": "length",
        "stop_match": "",
        "usage": {"prompt_tokens": 2, "completion_tokens": 2, "cached_tokens": 0, "migrations": 0},
    }
    sent = router.service.requests[0]
    assert (sent.sampling.temperature, sent.sampling.top_p, sent.sampling.seed) == (0.5, 0.9, 7)
    assert list(sent.stop.stop_strings) == ["END", "."]


def test_complete_streams_and_ctrl_c_cancels(router: FakeRouter) -> None:
    process = subprocess.Popen(
        command("complete", "--address", router.address, "endless"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    assert os.read(process.stdout.fileno(), 6) == b" word0"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (130, b"")
    assert eventually(lambda: router.service.running == 0 and router.service.cancelled == 1)


def test_complete_ends_quietly_when_its_reader_has_enough(router: FakeRouter) -> None:
    process = subprocess.Popen(
        command("complete", "--address", router.address, "endless"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    os.read(process.stdout.fileno(), 6)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(PATIENCE) == 141
    assert eventually(lambda: router.service.running == 0)


@pytest.mark.parametrize(
    ("arguments", "closing", "sentence"),
    [
        (["complete"], "<&-", "no prompt: give one, or pipe one in"),
        (["complete", "-"], "<&-", "stdin is closed"),
        (["complete", "hello"], ">&-", "stdout is closed"),
        (["chat"], "<&-", "stdin is closed"),
        (["chat"], ">&-", "stdout is closed"),
    ],
)
def test_a_stream_that_the_shell_closed_is_named(arguments: list[str], closing: str, sentence: str) -> None:
    shell = ["sh", "-c", f'exec "$@" {closing}', "sh", *command(*arguments)]
    result = subprocess.run(shell, capture_output=True, env=environment(), timeout=PATIENCE, check=False, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].endswith(sentence)
    assert "Traceback" not in result.stderr


def test_complete_names_the_flag_to_change(router: FakeRouter) -> None:
    router.service.failures += [InvalidArgument("1000000 tokens are too many", field="max_tokens")]
    result = run("complete", "--address", router.address, "hello")
    assert result.returncode == 2
    assert result.stderr == "hma-serve complete: 1000000 tokens are too many; change --max-tokens\n"
    result = run("complete", "--address", router.address, "--timeout", "0.5", "silent")
    assert result.returncode == 124
    assert result.stderr.strip().endswith("raise --timeout")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        nobody = f"127.0.0.1:{probe.getsockname()[1]}"
    result = run("complete", "--address", nobody, "hello")
    assert result.returncode == 75
    assert nobody in result.stderr
    assert "--address" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_complete_refuses_a_prompt_that_is_not_text(router: FakeRouter) -> None:
    result = run("complete", "--address", router.address, stdin=b"\xff\xfe")
    assert (result.returncode, "UTF-8" in result.stderr, result.stdout) == (2, True, "")


def test_complete_keeps_what_came_before_a_failure(router: FakeRouter) -> None:
    result = run("complete", "--address", router.address, "broken")
    assert (result.returncode, result.stdout) == (75, " word0 word1\n")
    assert result.stderr == "hma-serve complete: the decode worker is gone and no other took over\n"


def test_chat_reads_a_pipe_and_prints_answers_alone(router: FakeRouter) -> None:
    lines = "Hello\n\n/system Be brief.\nHow are\\\nyou\n//etc\n"
    result = run("chat", "--address", router.address, "--no-thinking", "--temperature", "0", stdin=lines)
    assert (result.returncode, result.stdout) == (0, "1: Hello\n2: How are you\n4: /etc\n")
    first, second, third = router.service.requests
    assert first.chat.template_kwargs["enable_thinking"] is False
    assert first.sampling.temperature == 0
    assert [message.role for message in second.chat.messages] == ["system", "user"]
    assert second.chat.messages[1].content == "How are\nyou"
    assert [message.role for message in third.chat.messages] == ["system", "user", "assistant", "user"]


def test_chat_from_a_pipe_ends_with_the_first_failure(router: FakeRouter) -> None:
    router.service.failures.append(ResourceExhausted("the queue is full"))
    result = run("chat", "--address", router.address, stdin="Hello\nHello again\n")
    assert (result.returncode, result.stdout) == (75, "")
    assert result.stderr == "hma-serve chat: the queue is full\n"
    assert len(router.service.requests) == 1


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, arguments: list[str], state: Path) -> None:
        self._master, slave = pty.openpty()
        env = environment() | {"XDG_STATE_HOME": str(state), "TERM": "dumb", "INPUTRC": "/dev/null"}
        self.process = subprocess.Popen(
            arguments, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True
        )
        os.close(slave)
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def expect(self, text: str) -> str:
        """Reads until the text appears; returns what came up to and with it, and forgets it."""
        end = time.monotonic() + PATIENCE
        while text not in self.screen:
            left = end - time.monotonic()
            assert left > 0, f"no {text!r} on the screen: {self.screen!r}"
            if select.select([self._master], [], [], left)[0]:
                try:
                    self.screen += os.read(self._master, 65536).decode()
                except OSError:  # the program has ended
                    assert text in self.screen, f"no {text!r} before the end: {self.screen!r}"
        before, _, self.screen = self.screen.partition(text)
        return before + text

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)


@contextlib.contextmanager
def chatting(router: FakeRouter, state: Path, *flags: str) -> Iterator[Terminal]:
    terminal = Terminal(command("chat", "--address", router.address, *flags), state)
    try:
        terminal.expect("demo, 4096 tokens of context")
        terminal.expect("> ")
        yield terminal
    finally:
        terminal.close()


def test_chat_answers_remembers_and_leaves(router: FakeRouter, tmp_path: Path) -> None:
    with chatting(router, tmp_path) as terminal:
        terminal.type("Good morning\n")
        terminal.expect("1: Good morning")
        terminal.expect("> ")
        terminal.type("And again\n")
        terminal.expect("3: And again")
        terminal.expect("> ")
        terminal.type("/reset\n")
        terminal.expect("(a new conversation)")
        terminal.type("Anew\n")
        terminal.expect("1: Anew")
        terminal.expect("> ")
        terminal.type("\x04")
        assert terminal.wait() == 0


def test_ctrl_c_stops_the_answer_not_the_program(router: FakeRouter, tmp_path: Path) -> None:
    with chatting(router, tmp_path) as terminal:
        terminal.type("endless\n")
        terminal.expect(" word3")
        terminal.interrupt()
        terminal.expect("\n> ")
        assert eventually(lambda: router.service.running == 0 and router.service.cancelled == 1)
        terminal.type("Still there?\n")
        terminal.expect("3: Still there?")  # what was read of the stopped answer is part of the conversation
        terminal.expect("> ")
        terminal.type("half a line")
        terminal.expect("half a line")
        terminal.interrupt()
        terminal.expect("\n> ")
        terminal.type("/quit\n")
        assert terminal.wait() == 0


def test_ctrl_c_before_the_first_token_forgets_the_question(router: FakeRouter, tmp_path: Path) -> None:
    with chatting(router, tmp_path) as terminal:
        terminal.type("silent\n")
        assert eventually(router.service.started.is_set)
        terminal.interrupt()
        terminal.expect("\n> ")
        terminal.type("Hello\n")
        terminal.expect("1: Hello")


def test_chat_commands_and_failures(router: FakeRouter, tmp_path: Path) -> None:
    with chatting(router, tmp_path, "--system", "Be kind.") as terminal:
        terminal.type("/help\n")
        for word in ("/reset", "/system TEXT", "/stats", "/quit", "Ctrl-C"):
            terminal.expect(word)
        terminal.type("/system\n")
        terminal.expect("Be kind.")
        terminal.type("/nonsense\n")
        terminal.expect("there is no /nonsense")
        terminal.type("/stats\n")
        terminal.expect("(speed is shown")
        terminal.type("one two\n")
        terminal.expect("2: one two")
        terminal.expect("(3 tokens, ")
        terminal.expect("> ")
        router.service.failures.append(InvalidArgument("that cannot be", field="temperature"))
        terminal.type("three\n")
        terminal.expect("that cannot be; change --temperature")
        terminal.expect("> ")
        terminal.type("four\n")
        terminal.expect("4: four")  # the failed turn is forgotten


def test_the_history_outlives_the_program(router: FakeRouter, tmp_path: Path) -> None:
    with chatting(router, tmp_path) as terminal:
        terminal.type("a memorable line\n")
        terminal.expect("1: a memorable line")
        terminal.expect("> ")
        terminal.type("/quit\n")
        assert terminal.wait() == 0
    history = tmp_path / "hma-serve" / "chat_history"
    assert "a memorable line" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0
    with chatting(router, tmp_path) as terminal:
        terminal.type("\x1b[A\x1b[A")  # two lines up, above /quit
        terminal.expect("a memorable line")
        terminal.type("\n")
        terminal.expect("1: a memorable line")


def test_chat_without_a_server_says_so_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        nobody = f"127.0.0.1:{probe.getsockname()[1]}"
    terminal = Terminal(command("chat", "--address", nobody), tmp_path)
    terminal.expect("--address")
    assert terminal.wait() == 75
    terminal.close()
