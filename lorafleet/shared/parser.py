"""The command-line parser: suggestions for unknown words, examples in the help, and a short and a long help."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from lorafleet.shared.examples import EXAMPLES


class Parser(argparse.ArgumentParser):
    """A parser of the command line, or of one of its commands.

    Each command's parser stores itself in the default `parser`, so that it reports its own unknown flags.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **options)
        self.long_groups: list[Any] = []
        """Groups of flags that only `--help-all` shows."""
        self.set_defaults(parser=self)

    def error(self, message: str) -> NoReturn:
        """Print the error and how to get help, and exit with 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def format_help(self) -> str:
        """Return the help without the groups that only `--help-all` shows."""
        return self.format_whole_help(shows_all=not self.long_groups)

    def format_whole_help(self, *, shows_all: bool = True) -> str:
        """Return the help. shows_all: include every group."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(_filled(self.description, formatter._width))
        for group in self._action_groups:
            if shows_all or group not in self.long_groups:
                formatter.start_section(group.title)
                formatter.add_text(group.description)
                formatter.add_arguments(group._group_actions)
                formatter.end_section()
        lines = EXAMPLES.get(self.prog, ())
        if lines:
            formatter.add_text("examples:\n" + "\n".join(f"  {line}" for line in lines))
        formatter.add_text(_filled(self.epilog, formatter._width))
        return formatter.format_help()

    def add_help_all(self) -> None:
        """Declare `--help-all`, which shows the groups that `--help` leaves out."""
        self.add_argument("--help-all", action=_HelpAll, nargs=0, help="show all flags and exit")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            close = suggestion(str(value), choices)
            if isinstance(action, argparse._SubParsersAction):
                self.error(f"unknown command {str(value)!r:.100}{close}")
            known = f"one of {', '.join(choices)}" if len(choices) > 1 else f"{choices[0]}, the only choice"
            raise argparse.ArgumentError(action, f"{value!r:.100} is not {known}{close}")


def _filled(text: str | None, width: int) -> str | None:
    """Return a text with lines of at most `width` characters; one that has several lines keeps them."""
    return text if text is None or "\n" in text else textwrap.fill(text, width, break_on_hyphens=False)


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, Parser)
        sys.stdout.write(parser.format_whole_help())
        parser.exit()


ALIASES = ("ls",)
"""Aliases of `list`."""


def number(text: str) -> int:
    """Return the value of a flag that is a count. Raises ArgumentTypeError unless it is from 1 to 2⁶³ − 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.100} is not a whole number") from None
    if not 1 <= value <= sys.maxsize:
        raise argparse.ArgumentTypeError(f"{text} is {'less than 1' if value < 1 else 'too large'}")
    return value


def suggestion(word: str, known: Sequence[str]) -> str:
    """Return the end of an error about an unknown word: the most similar known word, "" without one."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def parse(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """Return the arguments; for an unknown flag or word, exit with 2 and a suggestion.

    Flags may stand between the words of a list, where argparse alone would only take the words before the first flag.
    """
    args, unknown = parser.parse_known_args(words)
    if unknown:
        used: Parser = args.parser
        flag = next((word for word in unknown if word.startswith("-")), "")
        rest = next((one for one in used._actions if not one.option_strings and one.nargs in ("*", "+")), None)
        if rest is not None and not flag:
            setattr(args, rest.dest, [*getattr(args, rest.dest), *unknown])
            return args
        word = (flag or unknown[0]).partition("=")[0]
        flags = list(used._option_string_actions)
        used.error(f"unknown argument {word}{suggestion(word, flags)}")
    return args
