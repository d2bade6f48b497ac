"""The `lorafleet` command. A subcommand is a module with `add_arguments(parser)` and `run(args)`, an exit code."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Collection, Sequence
from typing import NoReturn

from protocol.runtime.imports import importing
from protocol.runtime.private_files import use_private_umask
from protocol.runtime.redaction import redact
from protocol.runtime.release import RELEASE
from protocol.wire.errors import ClientError, LorafleetError

COMMANDS = {
    "up": ("lorafleet.up", "start a whole fleet on this machine"),
    "serve": ("lorafleet.serve", "run one service against a queue"),
    "demo": ("lorafleet.demo", "start a fleet with a small model and three adapters, and ask them"),
    "fetch": ("lorafleet.fetch", "fetch the base model, so that services find it when they start"),
    "keys": ("lorafleet.keys", "create, list and revoke API keys, and set the limits of their tenants"),
    "top": ("lorafleet.operate.top", "show what a running fleet does, again and again"),
    "doctor": ("lorafleet.operate.doctor", "look at a fleet and this machine, and say what is to be done"),
    "adapters": (
        "lorafleet.operate.adapters",
        "list a fleet's adapters; add, pin, preload, evict, remove one",
    ),
    "workers": ("lorafleet.operate.workers", "list workers, and take one out of the work and back"),
    "chat": ("lorafleet.operate.chat", "talk with a model in the terminal"),
    "usage": ("lorafleet.operate.usage", "tell what was used, by day, tenant and model"),
    "audit": ("lorafleet.operate.audit", "list what operators have done"),
    "users": ("lorafleet.users", "make the users of a queue: a password for each service, and the ACL file"),
    "dlq": ("lorafleet.dlq", "list, show and retry requests that were given up"),
    "adapter": ("adapter_store.command", "check an adapter, or convert one of MLX-LM or llama.cpp, without a fleet"),
    "batch": ("lorafleet.operate.batch", "run a file of calls as a batch, and list, show and cancel batches"),
    "explain": ("lorafleet.operate.explain", "tell what became of a request, and run it again to compare"),
    "jobs": ("lorafleet.operate.jobs", "list, show, follow and cancel background jobs"),
    "bench": ("lorafleet.bench.cli", "put load on an OpenAI-compatible server and measure it"),
    "profile": ("lorafleet.profile", "measure what a worker's steps spend their time on"),
    "completion": ("lorafleet.operate.completion", "print what makes a shell complete these commands"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser_of(names: Collection[str]) -> argparse.ArgumentParser:
    """Return the parser of the command line, with the arguments of the commands `names`: only these are imported."""
    parser = _Parser(prog="lorafleet", description="Thousands of LoRA adapters from one base model.")
    parser.add_argument("--version", action="version", version=RELEASE)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name in names:
            with importing():
                imported = importlib.import_module(module)
            imported.add_arguments(command)
            command.set_defaults(run=imported.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 2 for wrong usage or settings, 1 for any other failure."""
    use_private_umask()
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in words if not word.startswith("-")), None)
    try:
        args = parser_of([] if chosen is None else [chosen]).parse_args(words)
        return args.run(args)
    except LorafleetError as error:
        print(f"lorafleet {chosen}: error: {redact(error.message)}", file=sys.stderr)
        return 2 if isinstance(error, ClientError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
