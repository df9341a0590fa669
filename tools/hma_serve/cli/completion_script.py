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
    """Each command with what its own parser accepts; a command's own commands go by both words: `kv encode`."""
    described: dict[str, Described] = {}
    for name, command in commands.items():
        try:
            parser: argparse.ArgumentParser = importlib.import_module(command.module).build_parser()
        except ImportError:
            described[name] = Described(command.summary)
        else:
            described |= _described(name, command.summary, parser)
    return described


def _described(name: str, summary: str, parser: argparse.ArgumentParser) -> dict[str, Described]:
    # argparse offers no public way to look at what was added.
    flags = tuple(_flag(action) for action in parser._actions if action.option_strings)
    words: tuple[str, ...] = ()
    below: dict[str, Described] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action._choices_actions:
                below |= _described(f"{name} {one.dest}", one.help or "", action.choices[one.dest])
        elif not action.option_strings:
            words += tuple(map(str, action.choices or ()))
    return {name: Described(summary, flags, words)} | below


def _below(commands: Mapping[str, Described], name: str = "") -> dict[str, Described]:
    """The commands of a command, or of the program, by their last word."""
    parts = {path.rpartition(" "): command for path, command in commands.items()}
    return {word: command for (outer, _, word), command in parts.items() if outer == name}


def _two_words(commands: Mapping[str, Described]) -> str:
    """The commands of commands, as a pattern of `case` in bash and zsh."""
    return "|".join(_quoted(name) for name in commands if " " in name) or "''"


def _flag(action: argparse.Action) -> Flag:
    summary = "" if action.help in (None, argparse.SUPPRESS) else str(action.help) % vars(action)
    return Flag(
        names=tuple(action.option_strings),
        summary=" ".join(summary.split()),
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
        f'        COMPREPLY=($(compgen -W {_quoted(" ".join(_below(commands)))} -- "$current"))',
        "        return",
        "    fi",
        "    local command=${COMP_WORDS[1]}",
        "    if (( COMP_CWORD > 2 )); then",
        '        case "$command ${COMP_WORDS[2]}" in',
        f'            {_two_words(commands)}) command+=" ${{COMP_WORDS[2]}}" ;;',
        "        esac",
        "    fi",
        '    case "$command $previous" in',
    ]
    for name, command in commands.items():
        for flag in command.flags:
            if flag.takes_value:
                pattern = "|".join(_quoted(f"{name} {one}") for one in flag.names)
                lines.append(f"        {pattern}) {_bash_values(flag)}; return ;;")
    lines += ["    esac", '    case "$command" in']
    for name, command in commands.items():
        words = [*_below(commands, name), *command.words, *(one for flag in command.flags for one in flag.names)]
        lines.append(f'        {_quoted(name)}) COMPREPLY=($(compgen -W {_quoted(" ".join(words))} -- "$current")) ;;')
    lines += ["    esac", "}", "complete -F _hma_serve hma-serve", ""]
    return "\n".join(lines)


def _bash_values(flag: Flag) -> str:
    if flag.choices:
        return f'COMPREPLY=($(compgen -W {_quoted(" ".join(flag.choices))} -- "$current"))'
    return "compopt -o default"


def zsh(commands: Mapping[str, Described]) -> str:
    """The script for zsh."""
    described = " ".join(
        _quoted(name + ":" + command.summary.replace(":", "\\:")) for name, command in _below(commands).items()
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
        "    local command=$words[1]",
        "    if (( CURRENT > 2 )); then",
        '        case "$command $words[2]" in',
        f'            {_two_words(commands)}) command+=" $words[2]"; shift words; (( CURRENT-- )) ;;',
        "        esac",
        "    fi",
        '    case "$command" in',
    ]
    for name, command in commands.items():
        specs = [_zsh_flag(one, flag) for flag in command.flags for one in flag.names]
        words = [*_below(commands, name), *command.words]
        specs += [_quoted(f"1: :({' '.join(words)})")] if words else []
        lines.append(f"        {_quoted(name)}) {' '.join(['_arguments', *specs] if specs else [])} ;;")
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
    lines = [
        "# Whether the words before the cursor, each with a space behind it, are like this.",
        "function __hma_serve_said",
        "    set -l words (commandline -opc)",
        "    set -e words[1]",
        '    string match -q -- $argv[1] "$words "',
        "end",
        "complete -c hma-serve -f",
    ]
    for name, command in commands.items():
        outer, _, word = name.rpartition(" ")
        place = _fish_said(f"{outer} ") if outer else "__fish_use_subcommand"
        lines.append(f"complete -c hma-serve -n {place} -a {word} -d {_fish_quoted(command.summary)}")
    for name, command in commands.items():
        condition = f"complete -c hma-serve -n {_fish_said(f'{name} ' if _below(commands, name) else f'{name} *')}"
        if command.words:
            lines.append(f"{condition} -a {_fish_quoted(' '.join(command.words))}")
        lines += [f"{condition} {_fish_flag(flag)}" for flag in command.flags]
    return "\n".join([*lines, ""])


def _fish_said(pattern: str) -> str:
    return _fish_quoted(f"__hma_serve_said {_fish_quoted(pattern)}")


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
