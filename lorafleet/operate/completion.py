"""`lorafleet completion` prints what makes a shell complete the words of this command line.

The scripts are made of the parsers themselves, so they know every command and flag, and ask nobody while one types.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

SHELLS = ("bash", "zsh", "fish")
HINTS = {
    "bash": 'eval "$(lorafleet completion bash)"   # in ~/.bashrc',
    "zsh": 'eval "$(lorafleet completion zsh)"    # in ~/.zshrc',
    "fish": "lorafleet completion fish | source     # in ~/.config/fish/config.fish",
}

_DEFAULT = re.compile(r" ?\(%\(default\)\w\)")
"""Where a help text would show a default."""

_BASH = """\
_lorafleet() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" path="lorafleet" i words=""
  for ((i = 1; i < COMP_CWORD; i++)); do
    case "$path ${{COMP_WORDS[i]}}" in
      {paths}) path="$path ${{COMP_WORDS[i]}}" ;;
    esac
  done
  case "$path" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
  [[ ${{#COMPREPLY[@]}} -gt 0 ]] || compopt -o default 2>/dev/null
}}
complete -F _lorafleet lorafleet
"""


@dataclass(slots=True)
class Words:
    """What may come after some words of a command line."""

    flags: dict[str, str] = field(default_factory=dict[str, str])  # flag -> its help
    below: dict[str, Words] = field(default_factory=dict[str, "Words"])
    text: str = ""  # what the command does


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(HINTS[shell] for shell in SHELLS)
    parser.add_argument("shell", choices=SHELLS)


def run(args: argparse.Namespace) -> int:
    """Print the script; return the exit code."""
    from lorafleet.__main__ import COMMANDS, parser_of  # which imports this module

    print(script(args.shell, words_of(parser_of(COMMANDS))), end="")
    return 0


def words_of(parser: argparse.ArgumentParser, text: str = "") -> Words:
    """Return what a parser takes."""
    found = Words(text=text)
    for action in parser._actions:  # argparse has no other way to ask
        if isinstance(action, argparse._SubParsersAction):
            texts = {one.dest: one.help or "" for one in action._choices_actions}
            for name, below in action.choices.items():
                found.below[name] = words_of(below, texts.get(name, ""))
        elif action.help != argparse.SUPPRESS:
            for flag in action.option_strings:
                if flag.startswith("--"):
                    found.flags[flag] = _DEFAULT.sub("", action.help or "").replace("%%", "%")
    return found


def script(shell: str, words: Words) -> str:
    """Return the script of a shell."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](words)


def _each(words: Words, path: str = "lorafleet") -> Iterator[tuple[str, Words]]:
    yield path, words
    for name, below in words.below.items():
        yield from _each(below, f"{path} {name}")


def _bash(words: Words) -> str:
    each = list(_each(words))
    cases = [f'    "{path}") words="{" ".join([*found.below, *found.flags])}" ;;' for path, found in each]
    paths = "|".join(f'"{path}"' for path, _ in each[1:])
    return _BASH.format(paths=paths, cases="\n".join(cases))


def _zsh(words: Words) -> str:
    return f"autoload -Uz compinit bashcompinit && compinit && bashcompinit\n{_bash(words)}"


def _fish(words: Words) -> str:
    lines = ["complete -c lorafleet -f"]
    for path, found in _each(words):
        names = path.split()[1:]
        conditions = [f"__fish_seen_subcommand_from {name}" for name in names]
        if found.below:
            conditions.append(f"not __fish_seen_subcommand_from {' '.join(found.below)}")
        when = f" -n '{'; and '.join(conditions)}'" if conditions else ""
        begin = f"complete -c lorafleet{when}"
        lines += [f"{begin} -a {name} -d {_quoted(below.text)}" for name, below in found.below.items()]
        if not found.below:
            lines += [f"{begin} -l {flag[2:]} -F -d {_quoted(text)}" for flag, text in found.flags.items()]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text[:80].replace("\\", "\\\\").replace("'", "\\'") + "'"
