"""What the terminal commands say and return, without a server."""

import subprocess
from pathlib import Path

import pytest

from hma_serve.cli import asking, completion_script
from hma_serve.cli.chat import COMMANDS as CHAT_COMMANDS
from hma_serve.cli.chat import Chat, Speed
from hma_serve.cli.line_input import history_path
from hma_serve.cli.main import COMMANDS, Command
from hma_serve.cli.main import main as hma_serve
from hma_serve.client import (
    Cancelled,
    Client,
    ContextLengthExceeded,
    DeadlineExceeded,
    HmaError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)


@pytest.mark.parametrize(
    ("error", "sentence", "status"),
    [
        (InvalidArgument("top_p is wrong", field="top_p"), "top_p is wrong; change --top-p", 2),
        (NotFound("no model x", field="model"), "no model x; change --model", 2),
        (ContextLengthExceeded("too long", field="prompt"), "too long; change the prompt", 2),
        (DeadlineExceeded("too late", field="timeout"), "too late; raise --timeout", 124),
        (
            Unavailable("nobody", field="address"),
            "nobody; is `hma-serve up` running? --address takes the router's gRPC address, as it prints it, not HTTP's",
            75,
        ),
        (ResourceExhausted("full"), "full", 75),
        (Unavailable("two\nlines"), "two lines", 75),
        (Cancelled("gone"), "gone", 1),
    ],
    ids=lambda value: value.code if isinstance(value, HmaError) else None,
)
def test_an_error_is_one_sentence_and_a_status(error: HmaError, sentence: str, status: int) -> None:
    assert asking.sentence(error) == sentence
    assert asking.exit_status(error) == status


def test_a_missing_package_names_the_extra_and_what_to_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(COMMANDS, "lost", Command("no_such_package", "router", "not here"))
    assert hma_serve(["lost"]) == 1
    assert capsys.readouterr().err == (
        "hma-serve lost: the package 'no_such_package' is missing; install hma-serve with its extra 'router' "
        "(in a clone: pip install '.[router]')\n"
    )


def test_the_history_lives_below_the_state_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path() == tmp_path / "hma-serve" / "chat_history"
    monkeypatch.setenv("XDG_STATE_HOME", "relative/is/to/be/ignored")
    monkeypatch.setenv("HOME", "/home/ann")
    assert history_path() == Path("/home/ann/.local/state/hma-serve/chat_history")


def test_speed_counts_from_the_first_token() -> None:
    speed = Speed(asked=10.0)
    assert speed.line() == "(no tokens)"
    speed.count(1, 10.5)
    assert speed.line() == "(1 tokens, 0.50 s to the first)"
    speed.count(4, 11.5)
    speed.count(4, 12.5)
    assert speed.line() == "(9 tokens, 0.50 s to the first, 4.0 tokens/s after it)"


def test_every_chat_command_is_told_by_help(capsys: pytest.CaptureFixture[str]) -> None:
    with Client() as client:
        assert Chat(client, {}).take("/help")
    told = capsys.readouterr().err
    for name in (*CHAT_COMMANDS, "quit"):
        assert f"  /{name} " in told


def described() -> dict[str, completion_script.Described]:
    names = ("up", "complete", "chat", "kv", "completion")
    return completion_script.describe({name: COMMANDS[name] for name in names})


def completed_by_bash(line: str) -> list[str]:
    """What bash offers after Tab at the end of the line."""
    words = line.replace("=", " = ").split(" ")
    script = (
        f"{completion_script.bash(described())}\n"
        "compopt() { COMPREPLY=(FILES); }\n"
        f"COMP_WORDS=({' '.join(f'{word!r}' for word in words)})\n"
        "COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))\n"
        '_hma_serve; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return result.stdout.split()


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("hma-serve co", ["complete", "completion"]),
        ("hma-serve up --dt", ["--dtype"]),
        ("hma-serve up --dtype ", ["bfloat16", "float32"]),
        ("hma-serve up --dtype=f", ["float32"]),
        ("hma-serve up --data-dir ", ["FILES"]),
        ("hma-serve completion z", ["zsh"]),
        ("hma-serve complete --max", ["--max-tokens"]),
        ("hma-serve kv v", ["verify", "vectors"]),
        ("hma-serve kv encode --ro", ["--rows", "--rounding"]),
        ("hma-serve kv encode --rounding ", ["nearest_even", "nearest_away", "truncate"]),
        ("hma-serve kv encode --rounding=t", ["truncate"]),
        ("hma-serve kv calibrate -o ", ["FILES"]),
        ("hma-serve kv inspect out.kv --j", ["--json"]),
        ("hma-serve kv nonsense --", ["--help"]),
        ("hma-serve nonsense --", []),
    ],
)
def test_bash_completes(line: str, offers: list[str]) -> None:
    assert completed_by_bash(line) == offers


def test_zsh_and_fish_are_told_every_flag_of_every_command() -> None:
    zsh, fish = completion_script.zsh(described()), completion_script.fish(described())
    for name, command in described().items():
        assert f"        '{name}') _arguments " in zsh
        for flag in command.flags:
            for one in flag.names:
                assert f"'{one}[" in zsh or f"'{one}=[" in zsh
                letter = f"-l {one[2:]}" if one.startswith("--") else f"-s {one[1:]}"
                said = f"{name} " if name == "kv" else f"{name} *"
                assert f"__hma_serve_said \\'{said}\\'' " in fish
                assert letter in fish
    assert "'--dtype=[decode'\\''s weights (default: bfloat16)]: :(bfloat16 float32)'" in zsh
    assert "'--rounding=[default: nearest_even]: :(nearest_even nearest_away truncate)'" in zsh
    assert "'1: :(encode decode inspect verify vectors calibrate)'" in zsh
    assert "-n '__hma_serve_said \\'kv \\'' -a vectors -d 'write the golden vectors'" in fish
    assert "-n __fish_use_subcommand -a kv " in fish
    assert "-l dtype -x -a 'bfloat16 float32' -d 'decode\\'s weights (default: bfloat16)'" in fish


def test_a_command_that_is_not_installed_is_completed_by_name() -> None:
    commands = completion_script.describe({"lost": Command("hma_serve.lost.main", "lost", "not here")})
    assert commands == {"lost": completion_script.Described("not here")}
    for write in completion_script.WRITERS.values():
        assert "lost" in write(commands)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_covers_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hma_serve(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
