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
    "demo": ("lorafleet.demo", "start a fleet with a small model and three adapters, and send each a question"),
    "fetch": ("lorafleet.fetch", "download the base model before services start"),
    "keys": ("lorafleet.keys", "create, list and revoke API keys, and set the limits of their tenants"),
    "top": ("lorafleet.operate.top", "show live metrics of a running fleet"),
    "doctor": ("lorafleet.operate.doctor", "diagnose a fleet and this machine, and suggest fixes"),
    "adapters": (
        "lorafleet.operate.adapters",
        "list, add, pin, preload, evict and remove a fleet's adapters",
    ),
    "workers": ("lorafleet.operate.workers", "list, drain and resume workers"),
    "chat": ("lorafleet.operate.chat", "chat with a model in the terminal"),
    "usage": ("lorafleet.operate.usage", "report usage by day, tenant and model"),
    "audit": ("lorafleet.operate.audit", "show the audit log of operators' actions"),
    "users": ("lorafleet.users", "create the queue's users: a password for each service, and the ACL file"),
    "dlq": ("lorafleet.dlq", "list, show and retry dead letters: requests that were given up"),
    "adapter": (
        "adapter_store.command",
        "check an adapter folder, or convert one from MLX-LM or llama.cpp; offline",
    ),
    "batch": ("lorafleet.operate.batch", "run a JSONL file of calls as a batch; list, show and cancel batches"),
    "explain": ("lorafleet.operate.explain", "show a request's timeline, or replay it and compare the tokens"),
    "jobs": ("lorafleet.operate.jobs", "list, show, follow and cancel background jobs"),
    "bench": ("lorafleet.bench.cli", "benchmark an OpenAI-compatible server"),
    "profile": ("lorafleet.profile", "profile where a worker's steps spend their time"),
    "completion": ("lorafleet.operate.completion", "print a shell completion script"),
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
