"""The `lorafleet` command. A subcommand is a module with `add_arguments(parser)` and `run(args)`, its exit code."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Collection, Sequence

from lorafleet.shared.parser import Parser, parse
from protocol.runtime.imports import importing
from protocol.runtime.private_files import use_private_umask
from protocol.runtime.redaction import redact
from protocol.runtime.release import RELEASE
from protocol.wire.errors import ClientError, LorafleetError

COMMANDS = {
    "up": ("lorafleet.up", "start a whole fleet on this machine"),
    "demo": ("lorafleet.demo", "start a fleet with a small model and three adapters, and ask each a question"),
    "status": ("lorafleet.local.status", "show the fleets on this machine, or the one at --url"),
    "logs": ("lorafleet.local.logs", "show the logs of a fleet on this machine"),
    "stop": ("lorafleet.local.stop", "stop a fleet on this machine"),
    "chat": ("lorafleet.operate.chat", "chat with a model in the terminal"),
    "adapters": (
        "lorafleet.operate.adapters",
        "list, add, pin, preload, evict and remove adapters; check and convert adapter folders",
    ),
    "bases": ("lorafleet.bases", "list, add and remove base models"),
    "workers": ("lorafleet.operate.workers", "list, drain and resume workers"),
    "jobs": ("lorafleet.operate.jobs", "list, show, follow and cancel background jobs"),
    "batch": ("lorafleet.operate.batch", "run a JSONL file of calls as a batch; list, show and cancel batches"),
    "top": ("lorafleet.operate.top", "show live metrics"),
    "explain": ("lorafleet.operate.explain", "show a request's timeline, or replay it and compare the tokens"),
    "usage": ("lorafleet.operate.usage", "report usage by day, tenant and model"),
    "audit": ("lorafleet.operate.audit", "show the audit log"),
    "dlq": ("lorafleet.dlq", "list, show and retry dead letters: requests that failed too often"),
    "keys": ("lorafleet.keys", "create, list and revoke API keys, and set tenants' limits"),
    "doctor": ("lorafleet.operate.doctor", "diagnose a fleet and this machine, and suggest fixes"),
    "serve": ("lorafleet.serve", "run one service of a fleet"),
    "users": ("lorafleet.users", "create the users of an external queue: passwords and the ACL file"),
    "fetch": ("lorafleet.fetch", "download a base model"),
    "bench": ("lorafleet.bench.cli", "benchmark an OpenAI-compatible server"),
    "profile": ("lorafleet.profile", "profile a worker's steps"),
    "completion": ("lorafleet.operate.completion", "print a shell completion script"),
}


def parser_of(names: Collection[str]) -> Parser:
    """Return the parser of the command line. Only modules of the commands `names` are imported, for their arguments."""
    parser = Parser(prog="lorafleet", description="Serve thousands of LoRA adapters from one base model.")
    parser.add_argument("--version", action="version", version=RELEASE)
    commands = parser.add_subparsers(metavar="COMMAND", required=bool(names))
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[:1].upper()}{text[1:]}.")
        if name in names:
            with importing():
                imported = importlib.import_module(module)
            imported.add_arguments(command)
            command.set_defaults(run=imported.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 2 for wrong usage or settings, 1 for other failures."""
    use_private_umask()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    chosen = next((word for word in words if not word.startswith("-")), None)
    try:
        parser = parser_of([] if chosen is None else [chosen])
        args = parse(parser, words)
        if chosen is None:
            parser.print_help()
            return 0
        code = args.run(args)
        sys.stdout.flush()
        return code
    except LorafleetError as error:
        print(f"lorafleet {chosen}: error: {redact(error.message)}", file=sys.stderr)
        return 2 if isinstance(error, ClientError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the output has exited, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python's own final flush fails
        return 141


if __name__ == "__main__":
    sys.exit(main())
