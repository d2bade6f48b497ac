"""`lorafleet serve SERVICE` runs one service in this process, until a signal ends it."""

from __future__ import annotations

import argparse
import importlib

from lorafleet.launcher.lifeline import hold_lifeline
from lorafleet.shared.flags import add_settings, load_settings
from lorafleet.shared.parser import Parser
from protocol.runtime.again import note_start
from protocol.runtime.environment import forget_secrets
from protocol.runtime.imports import importing
from protocol.runtime.service import run as run_service
from protocol.runtime.service import set_up_logging
from protocol.wire.errors import BadRequest

SERVICES = {
    "gateway": "gateway.service",
    "scheduler": "scheduler.service",
    "worker": "gpu_worker.service.program",
    "store": "adapter_store.service",
}
"""Service name -> the module whose `serve(settings, stop)` runs it."""

MAIN_FLAGS = (
    "redis_url", "model", "secret_file", "device", "adapters", "host", "port", "store_host", "metrics_port", "data",
)  # fmt: skip
"""The settings that `--help` shows first."""


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.usage = f"{parser.prog} {'|'.join(SERVICES)} [flags]"
    parser.add_argument(
        "service",
        metavar="|".join(SERVICES),
        choices=tuple(SERVICES),
        help="the service; the first signal drains it, the second stops it",
    )
    add_settings(parser, first=MAIN_FLAGS, skip=("workers",))


def run(args: argparse.Namespace) -> int:
    """Run the service; return its exit code."""
    note_start()
    hold_lifeline()
    settings = load_settings(args)
    forget_secrets(args.service)
    if args.service in ("worker", "gateway") and not settings.model:
        raise BadRequest(f"--model: the {args.service} needs a base model: a Hub id, a local folder or a GGUF file")
    set_up_logging(args.service, settings.log_level, settings.log_format)
    try:
        with importing():
            module = importlib.import_module(SERVICES[args.service])
    except ModuleNotFoundError as error:
        raise BadRequest(f"{error.name} is not installed: pip install 'lorafleet[worker]'") from error
    return run_service(lambda stop: module.serve(settings, stop), sendfile=args.service == "store")
