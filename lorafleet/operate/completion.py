"""`lorafleet completion` prints a shell script that completes this command line.

The scripts are generated from the parsers, so they know every command and flag, and call no program while one types.
"""

from __future__ import annotations

import argparse

import shtab

from lorafleet.shared.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell: bash, zsh or fish")


def run(args: argparse.Namespace) -> int:
    """Print the script; return the exit code."""
    from lorafleet.__main__ import COMMANDS, parser_of  # imported here, because it imports this module

    parser = parser_of(COMMANDS)
    _complete_files(parser)
    print(shtab.complete(parser, args.shell))
    return 0


def _complete_files(parser: Parser) -> None:
    """Complete file names for every value without choices, since many are, in all commands of a parser."""
    for action in parser._actions:  # argparse has no public way to list them
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _complete_files(below)
        elif action.nargs != 0 and not action.choices:
            action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]: shtab reads it there
