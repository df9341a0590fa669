"""`hma-serve completion SHELL`: a script that teaches a shell the commands and their flags.

Everything comes from the parsers that the commands themselves use, so the script cannot disagree with them. A command
whose packages are not installed is completed by name alone.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hma_serve.cli import main as program


@dataclass(frozen=True)
class Flag:
    """One option of a command.

    Attributes:
        names: `--model`, `-m`.
        summary: Its help, on one line.
        takes_value: Whether a value follows.
        choices: The values there are; empty: any, and file names are offered.
    """

    names: tuple[str, ...]
    summary: str
    takes_value: bool
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Described:
    """A command as a shell needs to know it.

    Attributes:
        summary: One line.
        flags: Its options.
        words: What its positional argument may be, where that is a fixed set.
    """

    summary: str
    flags: tuple[Flag, ...] = ()
    words: tuple[str, ...] = ()


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="hma-serve completion",
        description="Print a script that completes hma-serve's commands and flags.",
        epilog=(
            'bash: eval "$(hma-serve completion bash)" in ~/.bashrc\n'
            'zsh:  hma-serve completion zsh > "${fpath[1]}/_hma-serve"\n'
            "fish: hma-serve completion fish > ~/.config/fish/completions/hma-serve.fish"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=tuple(WRITERS))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    sys.stdout.write(WRITERS[args.shell](describe(program.COMMANDS)))
    return 0


def describe(commands: Mapping[str, program.Command]) -> dict[str, Described]:
    """Each command with what its own parser accepts."""
    return {name: _described(command) for name, command in commands.items()}


def _described(command: program.Command) -> Described:
    try:
        parser: argparse.ArgumentParser = importlib.import_module(command.module).build_parser()
    except ImportError:
        return Described(command.summary)
    actions = parser._actions  # argparse offers no public way to look at what was added
    flags = tuple(_flag(action) for action in actions if action.option_strings)
    words = tuple(str(choice) for action in actions if not action.option_strings for choice in action.choices or ())
    return Described(command.summary, flags, words)


def _flag(action: argparse.Action) -> Flag:
    summary = "" if action.help in (None, argparse.SUPPRESS) else " ".join(str(action.help).split())
    return Flag(
        names=tuple(action.option_strings),
        summary=summary.replace("%%", "%"),
        takes_value=action.nargs != 0,
        choices=tuple(map(str, action.choices or ())),
    )


def bash(commands: Mapping[str, Described]) -> str:
    """The script for bash."""
    lines = [
        "_hma_serve() {",
        "    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]}",
        "    # bash takes --flag=value apart at the sign.",
        "    [[ $previous == = ]] && previous=${COMP_WORDS[COMP_CWORD-2]}",
        "    [[ $current == = ]] && current=",
        "    COMPREPLY=()",
        "    if (( COMP_CWORD == 1 )); then",
        f'        COMPREPLY=($(compgen -W {_quoted(" ".join(commands))} -- "$current"))',
        "        return",
        "    fi",
        '    case "${COMP_WORDS[1]} $previous" in',
    ]
    for name, command in commands.items():
        for flag in command.flags:
            if flag.takes_value:
                pattern = "|".join(_quoted(f"{name} {one}") for one in flag.names)
                lines.append(f"        {pattern}) {_bash_values(flag)}; return ;;")
    lines += ["    esac", '    case "${COMP_WORDS[1]}" in']
    for name, command in commands.items():
        words = [*command.words, *(one for flag in command.flags for one in flag.names)]
        lines.append(f'        {name}) COMPREPLY=($(compgen -W {_quoted(" ".join(words))} -- "$current")) ;;')
    lines += ["    esac", "}", "complete -F _hma_serve hma-serve", ""]
    return "\n".join(lines)


def _bash_values(flag: Flag) -> str:
    if flag.choices:
        return f'COMPREPLY=($(compgen -W {_quoted(" ".join(flag.choices))} -- "$current"))'
    return "compopt -o default"


def zsh(commands: Mapping[str, Described]) -> str:
    """The script for zsh."""
    described = " ".join(
        _quoted(name + ":" + command.summary.replace(":", "\\:")) for name, command in commands.items()
    )
    lines = [
        "#compdef hma-serve",
        "",
        "_hma_serve() {",
        f"    local -a commands=({described})",
        "    if (( CURRENT == 2 )); then",
        "        _describe command commands",
        "        return",
        "    fi",
        "    shift words",
        "    (( CURRENT-- ))",
        "    case $words[1] in",
    ]
    for name, command in commands.items():
        specs = [_zsh_flag(one, flag) for flag in command.flags for one in flag.names]
        specs += [_quoted(f"1: :({' '.join(command.words)})")] if command.words else []
        lines.append(f"        {name}) _arguments {' '.join(specs)} ;;" if specs else f"        {name}) ;;")
    lines += [
        "    esac",
        "}",
        "",
        "# As a file in $fpath this is the function's body; sourced, it has to be announced.",
        "if [[ $zsh_eval_context[-1] == loadautofunc ]]; then",
        '    _hma_serve "$@"',
        "else",
        "    compdef _hma_serve hma-serve",
        "fi",
        "",
    ]
    return "\n".join(lines)


def _zsh_flag(name: str, flag: Flag) -> str:
    summary = flag.summary.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]")
    value = ""
    if flag.takes_value:
        value = f": :({' '.join(flag.choices)})" if flag.choices else ": :_files"
    sign = "=" if flag.takes_value and name.startswith("--") else ""
    return _quoted(f"{name}{sign}[{summary}]{value}")


def fish(commands: Mapping[str, Described]) -> str:
    """The script for fish."""
    lines = ["complete -c hma-serve -f"]
    for name, command in commands.items():
        lines.append(f"complete -c hma-serve -n __fish_use_subcommand -a {name} -d {_fish_quoted(command.summary)}")
    for name, command in commands.items():
        condition = f"complete -c hma-serve -n {_fish_quoted(f'__fish_seen_subcommand_from {name}')}"
        if command.words:
            lines.append(f"{condition} -a {_fish_quoted(' '.join(command.words))}")
        lines += [f"{condition} {_fish_flag(flag)}" for flag in command.flags]
    return "\n".join([*lines, ""])


def _fish_flag(flag: Flag) -> str:
    names = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in flag.names]
    value = ""
    if flag.takes_value:
        value = f" -x -a {_fish_quoted(' '.join(flag.choices))}" if flag.choices else " -r -F"
    summary = f" -d {_fish_quoted(flag.summary)}" if flag.summary else ""
    return " ".join(names) + value + summary


def _quoted(text: str) -> str:
    """One word for bash and zsh."""
    return "'" + text.replace("'", "'\\''") + "'"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


WRITERS: dict[str, Callable[[Mapping[str, Described]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
