"""The `lorafleet` command. A subcommand is a module with `add_arguments(parser)` and `run(args)`, an exit code."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from protocol.runtime.imports import importing
from protocol.runtime.private_files import use_private_umask
from protocol.runtime.redaction import redact
from protocol.wire.errors import ClientError, LorafleetError

COMMANDS = {
    "up": ("lorafleet.up", "start a whole fleet on this machine"),
    "serve": ("lorafleet.serve", "run one service against a queue"),
    "demo": ("lorafleet.demo", "start a fleet with a small model and three adapters, and ask them"),
    "fetch": ("lorafleet.fetch", "fetch the base model, so that services find it when they start"),
    "keys": ("lorafleet.keys", "create, list and revoke API keys, and set the limits of their tenants"),
    "users": ("lorafleet.users", "make the users of a queue: a password for each service, and the ACL file"),
    "dlq": ("lorafleet.dlq", "list, show and retry requests that were given up"),
    "adapter": ("adapter_store.command", "check an adapter, or convert one of MLX-LM or llama.cpp, without a fleet"),
    "batch": ("lorafleet.batch", "run a file of calls as a batch, and list, show and cancel batches"),
    "explain": ("lorafleet.explain", "tell what became of a request, and run it again to compare"),
    "jobs": ("lorafleet.jobs", "list, show, follow and cancel background jobs"),
    "bench": ("lorafleet.bench.cli", "put load on an OpenAI-compatible server and measure it"),
    "profile": ("lorafleet.profile", "measure what a worker's steps spend their time on"),
    "simulate": ("scheduler.simulate", "try scheduling policies on a simulated fleet"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 2 for wrong usage or settings, 1 for any other failure."""
    use_private_umask()
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog="lorafleet", description="Thousands of LoRA adapters from one base model.")
    parser.add_argument("--version", action="version", version=version("lorafleet"))
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    chosen = next((word for word in words if not word.startswith("-")), None)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name == chosen:  # only what runs is imported
            with importing():
                imported = importlib.import_module(module)
            imported.add_arguments(command)
            command.set_defaults(run=imported.run)
    args = parser.parse_args(words)
    try:
        return args.run(args)
    except LorafleetError as error:
        print(f"lorafleet {chosen}: error: {redact(error.message)}", file=sys.stderr)
        return 2 if isinstance(error, ClientError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
