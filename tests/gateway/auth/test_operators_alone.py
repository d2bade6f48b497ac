"""Operations reserved for operators check the caller before anything else, independently of the route's check."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.adapters.operations import AdapterOperations, Wanted
from gateway.auth.callers import NOBODY, Caller
from gateway.http.http_client import HttpClient
from gateway.operators.keys import KeyAdministration, KeyRequest, TenantChange
from gateway.operators.operator_routes import FleetEndpoints
from gateway.operators.workers import WorkerViews
from protocol.queue.books.api_keys import Tenant
from protocol.runtime.settings import Settings
from protocol.wire.errors import PermissionDenied


class Touched(Exception):
    """Raised when something was accessed before the caller was checked."""


class Untouched:
    """Stands for the queue or the body of a request, which must not be accessed."""

    def __getattr__(self, name: str) -> Any:
        raise Touched(name)

    def __aiter__(self) -> AsyncIterator[bytes]:
        raise Touched("body")

    async def __anext__(self) -> bytes:
        raise Touched("body")


def of(*scopes: str) -> Caller:
    return Caller(Tenant("acme"), scopes)


Act = Callable[[AdapterOperations, Caller], Awaitable[object]]


def wanted(caller: Caller, tenant: str) -> Wanted:
    return Wanted("shared", "hub:a/b", caller, tenant, replace=True)


ACTS: dict[str, tuple[Act, set[str]]] = {  # with the scopes that are not enough
    "pin": (lambda it, who: it.pin("shared", who, 0.0), {"infer", "adapters"}),
    "pin when served": (lambda it, who: it.pin_when_served("shared", who), {"infer", "adapters"}),
    "unpin": (lambda it, who: it.unpin("shared", who), {"infer", "adapters"}),
    "evict": (lambda it, who: it.evict("shared", who, 0.0), {"infer", "adapters"}),
    "upload": (lambda it, who: it.upload(wanted(who, ""), Untouched(), 9), {"infer", "adapters"}),
    "upload of one's own": (lambda it, who: it.upload(wanted(who, "acme"), Untouched(), 9), {"infer", "adapters"}),
    "register for all": (lambda it, who: it.register(wanted(who, "")), {"infer", "adapters"}),
    "register for others": (lambda it, who: it.register(wanted(who, "other")), {"infer", "adapters"}),
    "register": (lambda it, who: it.register(wanted(who, "acme")), {"infer"}),
    "preload": (lambda it, who: it.preload("shared", who, "", 0.0), {"infer"}),
    "refresh": (lambda it, who: it.refresh("shared", who, None, 0.0), {"infer"}),
    "unload": (
        lambda it, who: it.unload("shared", who, "", force=True, blob=True, wait_s=0.0), {"infer", "adapters"},
    ),
    "unload of others": (
        lambda it, who: it.unload("shared", who, "other", force=True, blob=True, wait_s=0.0), {"infer", "adapters"},
    ),
    "unload of one's own": (
        lambda it, who: it.unload("shared", who, "acme", force=True, blob=True, wait_s=0.0), {"infer"},
    ),
}  # fmt: skip


def operations(tmp_path: Path) -> AdapterOperations:
    aliases: Any = SimpleNamespace(listeners=[])
    return AdapterOperations(Untouched(), Settings(adapters=tmp_path), aliases, Untouched(), HttpClient())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ACTS)
async def test_operations_check_before_they_act(name: str, tmp_path: Path) -> None:
    act, too_little = ACTS[name]
    it = operations(tmp_path)
    for caller in (NOBODY, of(), *(of(scope) for scope in too_little), of(*too_little)):
        with pytest.raises(PermissionDenied):
            await act(it, caller)
    with pytest.raises(Touched):  # confirms that an operator passes the check
        await act(it, of("admin"))


async def test_orders_and_keys_check_before_they_act() -> None:
    untouched: Any = Untouched()
    keys, workers = KeyAdministration(untouched, writes=True), WorkerViews(untouched)
    fleet = FleetEndpoints.__new__(FleetEndpoints)
    fleet._letters = untouched
    acts: list[Callable[[Caller], Awaitable[object]]] = [
        lambda who: keys.create(KeyRequest(tenant="other"), who),
        lambda who: keys.revoke("key_1", who),
        lambda who: keys.change("acme", TenantChange(concurrency=9), who),
        lambda who: workers.order("w0", who, drain=True, wait_s=0.0),
        lambda who: workers.order("w0", who, drain=False, wait_s=0.0),
    ]
    for act in acts:
        for caller in (NOBODY, of("infer"), of("adapters"), of("infer", "adapters")):
            with pytest.raises(PermissionDenied):
                await act(caller)
        with pytest.raises(Touched):
            await act(of("admin"))
