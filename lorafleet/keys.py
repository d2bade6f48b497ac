"""`lorafleet keys` creates, lists and revokes API keys, and sets the limits of their tenants."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
from rich.console import Console

from lorafleet.shared.on_queue import add_flags, run_action
from lorafleet.shared.parser import ALIASES, Parser, suggestion
from lorafleet.shared.tables import print_list
from protocol.queue.books.api_keys import SCOPES, ApiKey, Tenant
from protocol.queue.books.audit import from_command_line
from protocol.queue.bus import Bus, now_ms
from protocol.runtime.settings import Settings, names_of
from protocol.wire.errors import BadRequest

LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency", "kept_bytes", "weight")
_UNITS_S = {"m": 60, "h": 3600, "d": 86_400, "y": 365 * 86_400}

run = run_action


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    actions = parser.add_subparsers(metavar="create|list|revoke", required=True)
    create = actions.add_parser("create", help="create a key; it is shown once, only its hash is stored")
    create.add_argument("--tenant", required=True, help="the tenant that the key belongs to")
    create.add_argument(
        "--scopes",
        type=_scope_names,
        default="infer",
        help=f"permissions, separated by commas: {', '.join(SCOPES)} (default: %(default)s)",
    )
    create.add_argument(
        "--expires", default="never", metavar="TIME", help="30m, 12h, 90d, 1y or never (default: %(default)s)"
    )
    create.add_argument("--note", default="", help="a note, shown by `list`")
    limits = create.add_argument_group(
        "limits of the tenant, shared by all its keys", "each given limit replaces the old one; 0: no limit"
    )
    limits.add_argument("--requests-per-minute", type=int, metavar="N", help="HTTP calls")
    limits.add_argument("--tokens-per-minute", type=int, metavar="N", help="prompt and output tokens")
    limits.add_argument("--concurrency", type=int, metavar="N", help="maximum choices queued or running at once")
    limits.add_argument(
        "--kept-bytes", type=int, metavar="BYTES", help="maximum bytes stored in the queue; 0: the fleet's default"
    )
    limits.add_argument("--weight", type=float, metavar="X", help="share relative to other tenants (initially 1)")
    limits.add_argument(
        "--visible",
        metavar="PATTERNS",
        help="patterns of the shared adapters it may use, such as acme-*,org/* (initially *)",
    )
    listing = actions.add_parser("list", aliases=ALIASES, help="list all keys, without their secrets")
    revoke = actions.add_parser("revoke", help="revoke a key; its next request is refused everywhere")
    revoke.add_argument("key", metavar="ID", help="id of the key, key_…")
    for action, do in ((create, _create), (listing, _list), (revoke, _revoke)):
        action.set_defaults(do=do)
        add_flags(action)


def _scope_names(text: str) -> tuple[str, ...]:
    """Return the scopes in a flag. Raises ArgumentTypeError, before a tenant's limits are changed."""
    names = names_of(text)
    for name in names:
        if name not in SCOPES:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(SCOPES)}{suggestion(name, SCOPES)}")
    if not names:
        raise argparse.ArgumentTypeError(f"give at least one of {', '.join(SCOPES)}")
    return names


async def _create(bus: Bus, _: Settings, args: argparse.Namespace) -> dict[str, Any]:
    keys = bus.api_keys
    changes: dict[str, Any] = {name: getattr(args, name) for name in LIMITS if getattr(args, name) is not None}
    if args.visible is not None:
        changes["adapters"] = names_of(args.visible)
    expires_ms = expiry_ms(args.expires)
    if changes:
        await keys.set_tenant(msgspec.structs.replace(await keys.tenant(args.tenant), **changes))
        limits = " ".join(f"{name}={value}" for name, value in changes.items())
        await bus.audit.note(from_command_line("tenant.change", args.tenant, limits))
    secret, key = await keys.create(args.tenant, args.scopes, expires_ms, args.note)
    detail = f"{key.id} scopes={','.join(key.scopes)} expires={args.expires}"
    await bus.audit.note(from_command_line("key.create", key.tenant, detail))
    if not args.json:
        print(secret)
    Console(stderr=True).print(f"{key.id} of {key.tenant}, scopes: {_scopes(key.scopes)}; the key is shown only once")
    return {"key": secret, **msgspec.structs.asdict(key)}


async def _list(bus: Bus, _: Settings, args: argparse.Namespace) -> list[dict[str, Any]]:
    found = await bus.api_keys.all()
    if not args.json:
        _print(found)
    return [
        {**msgspec.structs.asdict(key), "limits": {name: getattr(tenant, name) for name in (*LIMITS, "adapters")}}
        for key, tenant in found
    ]


def _print(found: Sequence[tuple[ApiKey, Tenant]]) -> None:
    columns = (
        "id", "tenant", "scopes", "created", "expires", "requests/min", "tokens/min", "concurrency", "bytes", "weight",
        "adapters", "note",
    )  # fmt: skip
    rows = [
        [key.id, key.tenant, _scopes(key.scopes), _time(key.created_ms), _expiry(key.expires_ms), *_limits(tenant),
         f"{tenant.weight:g}", " ".join(tenant.adapters), key.note]
        for key, tenant in found
    ]  # fmt: skip
    print_list(columns, rows, "no keys")


async def _revoke(bus: Bus, _: Settings, args: argparse.Namespace) -> dict[str, Any]:
    key = await bus.api_keys.revoke(args.key)
    await bus.audit.note(from_command_line("key.revoke", key.id, f"of {key.tenant}"))
    if not args.json:
        print(f"{key.id} of {key.tenant} was revoked; its running requests continue")
    return msgspec.structs.asdict(key)


def expiry_ms(text: str) -> int:
    """Return the unix time in ms at which a lifetime from now ends; 0 for "never". Raises BadRequest."""
    if text == "never":
        return 0
    found = re.fullmatch(r"(\d{1,6})([mhdy])", text)
    if found is None or not int(found[1]):
        raise BadRequest(f"--expires: {text!r} is not a lifetime; use 30m, 12h, 90d, 1y or never")
    return now_ms() + int(found[1]) * _UNITS_S[found[2]] * 1000


def _limits(tenant: Tenant) -> list[str]:
    return [str(getattr(tenant, name)) if getattr(tenant, name) else "-" for name in LIMITS[:4]]


def _scopes(scopes: list[str]) -> str:
    return ", ".join(scopes)


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000).isoformat(" ", "minutes")


def _expiry(ms: int) -> str:
    if not ms:
        return "never"
    return f"{_time(ms)} (expired)" if ms <= now_ms() else _time(ms)
