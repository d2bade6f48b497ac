"""The queue's users: the table covers everything that the code does, and a real server refuses everything else."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import pytest_asyncio
from helpers.script_queue import GATEWAY, ids, make_body, make_job, make_submit, row
from msgspec import structs
from redis.exceptions import NoPermissionError, ResponseError

import protocol.queue
from lorafleet.launcher.embedded import EmbeddedServer, start_embedded
from lorafleet.launcher.queue_users import password_file
from protocol.queue.adapters import NameLimits
from protocol.queue.books.api_keys import Tenant
from protocol.queue.books.quota import Quota
from protocol.queue.books.usage import CountedFor, usage_of
from protocol.queue.bus import CONNECTION_ERRORS, Bus, StepResult, now_ms
from protocol.queue.connection.redis_client import connect
from protocol.queue.kept.conversations import ConversationLimits
from protocol.queue.kept.jobs import NewJob
from protocol.queue.scripts import FOLDER
from protocol.queue.users import COMMANDS, PROBE, Rights, acl, table
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import Internal
from protocol.wire.keys import Keys
from protocol.wire.records import AdapterUse

KEYS = Keys()
SERVICES = ("gateway", "scheduler", "worker", "store")

_PYTHON = {"scan_iter": "scan", "register_script": "evalsha", "delete": "del", "transaction": "watch"}
_NO_COMMAND = {"aclose", "close", "execute", "from_pool", "from_url", "pipeline"}
_CLIENTS = re.compile(r"(self\._redis|self\._blocking|pipe|client)$")


def patterns(rights: Rights) -> set[str]:
    return {*rights.writes, *rights.reads, *rights.adds}


def built_keys() -> dict[str, str]:
    """Return the keys that `Keys` can build, by name, with * for each argument."""
    found: dict[str, str] = {}
    for name, member in vars(Keys).items():
        if isinstance(member, property):
            found[name] = getattr(KEYS, name)
        elif inspect.isfunction(member) and not name.startswith("_") and name != "is_permanent":
            number = len(inspect.signature(member).parameters) - 1
            found[name] = getattr(KEYS, name)(*["*"] * number)
    return found


def used_commands() -> dict[str, str]:
    """Return each command that the code runs on the queue, and the file that uses it."""
    found: dict[str, str] = {}
    for path in sorted(FOLDER.glob("*.lua")):
        for command in re.findall(r"\bp?call\(\s*'(\w+)'", path.read_text()):
            found[command.lower()] = path.name
    for path in sorted(Path(str(protocol.queue.__file__)).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name = node.func.attr
                if name == "ask" and isinstance(words := node.args[0], ast.Tuple):  # a `Line`
                    found[str(ast.literal_eval(words.elts[0])).lower()] = path.name
                elif _CLIENTS.fullmatch(ast.unparse(node.func.value)) and name not in _NO_COMMAND:
                    found[_PYTHON.get(name, name.replace("_", "|"))] = path.name
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                for command in re.findall(r"redis\.call\('(\w+)'", node.value):
                    found[command.lower()] = path.name
    return found


def test_every_key_is_in_the_table() -> None:
    covered = {pattern for rights in table().values() for pattern in (*rights.writes, *rights.adds)}
    keys = built_keys()
    assert len(keys) > 30, "the check would prove nothing"
    missing = {name: key for name, key in keys.items() if not any(fnmatchcase(key, _as_glob(p)) for p in covered)}
    assert not missing, f"say in protocol/queue/users.py which users may write {missing}"


def test_every_command_is_in_the_table() -> None:
    used = used_commands()
    assert {"xread", "hmget", "append", "scan", "mget"} <= used.keys(), "the check would prove nothing"
    missing = {command: where for command, where in used.items() if command not in (*COMMANDS, "scan")}
    assert not missing, f"say in protocol/queue/users.py that the services run {missing}"


def test_nobody_is_given_a_command_that_no_code_runs() -> None:
    around = {"client|setinfo", "client|setname", "ping", "select", "script|load", "evalsha", "exec", "multi",
              "discard", "unwatch"}  # fmt: skip
    assert set(COMMANDS) - used_commands().keys() - around == set()


def test_the_acl_file_holds_no_password() -> None:
    passwords = {name: f"password-of-{name}" for name in table()}
    text = acl(passwords)
    assert not [password for password in passwords.values() if password in text]
    assert text.splitlines()[0] == "user default reset"  # no access without a user name


def _as_glob(pattern: str) -> str:
    return pattern.replace("[", "[[]")


# ------------------------------------------------------------ a real server


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    server = start_embedded(tmp_path_factory.mktemp("guarded"), durable=False, guarded=True)
    yield server
    server.stop()


def url_of(server: EmbeddedServer, user: str) -> str:
    return Settings.model_validate(server.door(user)).queue_url()


@pytest_asyncio.fixture
async def buses(guarded: EmbeddedServer) -> AsyncIterator[dict[str, Bus]]:
    found = {user: Bus(url_of(guarded, user)) for user in table()}
    yield found
    for bus in found.values():
        await bus.close()


async def test_a_request_lives_its_whole_life_with_four_users(buses: dict[str, Bus]) -> None:
    gateway, scheduler, worker = buses["gateway"], buses["scheduler"], buses["worker"]
    keys = gateway.keys
    for name in SERVICES:
        await buses[name].server.check()
        await buses[name].restarted()
    await gateway.streams.create(keys.out(GATEWAY), 60)
    for stream in (keys.work("w"), keys.ctl("w")):
        await worker.streams.create(stream, 60)
    token = await scheduler.lead("", "s", 60_000)
    quota = Quota("acme", requests_per_minute=100, tokens_per_minute=10_000, concurrency=10, max_bytes=1 << 20)
    counted = usage_of(
        CountedFor("acme", "m", "", "b", batch=False, days=30), calls=1, prompt_tokens=2, has_output=True
    )
    for rids in (["r"], ["r2", "r3"]):
        pairs = [(make_submit(rid, tenant="acme"), make_body()) for rid in rids]
        kept = {"usages": [counted] * len(rids), "history": "60000 100", "text": 9}
        assert (await gateway.submit("interactive", pairs, max_queued=10, quota=quota, **kept))[0] == "ok"
    idem_key, idem_value = keys.idem("acme", "once"), m.encode(m.Idempotent("hash", now_ms(), ["r4"]))
    pairs = [(make_submit("r4"), make_body())]
    assert (await gateway.submit("batch", pairs, max_queued=9, idem_key=idem_key, idem_value=idem_value))[0] == "ok"
    assert await gateway.position("r2") == 1
    batch = [(m.Assigned(rid, 1, ""), 0) for rid in ("r", "r2", "r3")]
    assert (await scheduler.assign("w", batch, leader=token))[0] == "ok"
    await scheduler.streams.tell([("w", m.Control(kind="cancel", rid="r2"))])
    assert all(found.body() for found in await worker.inputs([make_submit("r"), make_submit("r2")]))
    step = StepResult(
        [row("r", 0, 5, 6, finish="stop")], {GATEWAY: [m.Delta("r", 1, 0, b"")]}, [m.Ended("r", "", 2, 0)]
    )
    assert await worker.step("w", step) == []
    delta = await gateway.read_log("r", 0)
    assert delta is not None
    assert (delta.ids, delta.finish) == (ids(5, 6), "stop")
    assert (await gateway.streams.read({keys.out(GATEWAY): b"0"}, block_ms=1000)).keys() == {keys.out(GATEWAY)}
    assert (await scheduler.streams.read({keys.ended: b"0"}, block_ms=1000)).keys() == {keys.ended}
    assert await gateway.cancel("r2") == "assigned"
    assert await worker.requeue("w", ["r3"], counts=False, max_attempts=3) == {"r3": "requeued"}
    letter = m.DeadLetter(reason="x", submit=make_submit("r3"))
    assert await scheduler.finish("r3", "failed", "error", dead_letter=letter)
    ((letter_id, _),) = await gateway.dead_letters.newest(5)
    assert await gateway.dead_letters.retry(letter_id, 60) == "r3"
    archive = gateway.archive
    assert await archive.lead(GATEWAY)
    [past] = await archive.new(await archive.tenants(0), 9, 0)
    assert [(one.tenant, one.entry and one.entry.rid) for one in past.found] == [("acme", "r"), ("acme", "r3")]
    assert all(one.text is not None for one in await archive.texts([("acme", "r"), ("acme", "r3")]))
    await archive.copied([past], 60_000)
    await archive.tell("a problem")
    assert await archive.problem() == "a problem"
    await archive.leave(GATEWAY)
    job = NewJob(make_job("job_r5", "r5"), b"{}", 60_000)
    pairs = [(make_submit("r5", tenant="acme", stored=True), make_body())]
    kept = {"usages": [counted], "history": "60000 100", "text": 9}
    assert (await gateway.submit("batch", pairs, max_queued=9, quota=quota, job=job, **kept))[0] == "ok"
    assert await gateway.finish("r5", "cancelled", "cancelled")
    assert await gateway.jobs.get("job_r5") == job.job
    assert await gateway.jobs.forget(job.job)
    assert await archive.is_deleted("acme", "r5")
    assert await archive.deletions(9) == [("acme", "r5")]
    await archive.deleted([("acme", "r5")])
    conversations, limits = gateway.conversations, ConversationLimits(60_000, 9, 9, 9999, 99_999)
    made = m.Conversation("conv_1", "acme", 1)
    assert (await conversations.change("conv_1", "acme", limits, record=made, is_new=True, items=[("a", b"1")]))[
        0
    ] == "ok"
    job = NewJob(structs.replace(make_job("resp_r6", "r6"), conversation="conv_1"), b"{}", 60_000)
    pairs = [(make_submit("r6", tenant="acme", stored=True), make_body())]
    assert (await gateway.submit("batch", pairs, max_queued=9, quota=quota, job=job))[0] == "ok"
    [turn] = await conversations.due(1 << 50, 9)
    await conversations.look_again(turn, 1)
    assert (await conversations.change("conv_1", "acme", limits, items=[("b", b"2")], response="resp_r6")).code == "ok"
    assert await conversations.items("conv_1") == [b"1", b"2"]
    assert await conversations.drop("conv_1", "acme", "a")
    assert await conversations.drop("conv_1", "acme")
    assert (await scheduler.memory())[0] > 0
    await scheduler.set(keys.status, m.SchedulerStatus(queued=0, running=0, workers=1, drain_rate=0.0), 5000)
    await scheduler.members.leave("w")
    await gateway.members.leave_gateway(GATEWAY)


async def test_names_and_keys_need_their_own_users(buses: dict[str, Bus]) -> None:
    gateway, store, operator = buses["gateway"], buses["store"], buses["operator"]
    keys = gateway.keys
    key, _ = await operator.api_keys.create("acme", ["infer"])
    assert await gateway.api_keys.find(key) is not None
    assert await store.members.beat(keys.store_beat("s"), keys.stores, "s", b"http://s", 5000)
    assert await gateway.members.store_urls() == await buses["worker"].members.store_urls() == ("http://s",)
    limits = NameLimits("acme", 10, 10)
    assert await gateway.adapters.register(m.Registration(name="pirate", source="hub:a/b", asked_ms=1), limits=limits)
    assert await gateway.adapters.ask_again("pirate", "", 2)
    assert list(await store.adapters.registrations()) == ["pirate"]
    assert await store.adapters.take_lease("pirate", 1000)
    await store.adapters.publish([(m.Alias(name="pirate", state="failed"), None)])
    assert await store.adapters.known_digests() == []
    assert await store.adapters.delete_records(["d"]) == ["d"]
    assert (await store.adapters.news("")).num_names == 1
    assert [alias.name for alias in await gateway.adapters.aliases()] == ["pirate"]
    await buses["worker"].adapters.note_use({"d": AdapterUse(hits=1, last_ms=1)})
    assert (await gateway.adapters.uses(["d"]))["d"].hits == 1
    await gateway.adapters.pin("pirate", "api")
    assert await gateway.adapters.unpin("pirate")
    assert await gateway.adapters.unregister("pirate")
    await store.members.leave_store("s")


FORBIDDEN: list[tuple[str, Sequence[str | int]]] = [
    # A worker reads no API keys, and only requests whose ids it was given; it names no adapters.
    ("worker", ["HGETALL", KEYS.api_keys]),
    ("worker", ["HGETALL", KEYS.tenants]),
    ("worker", ["XRANGE", KEYS.sub("interactive"), "-", "+"]),
    ("worker", ["XRANGE", KEYS.out("g"), "-", "+"]),
    ("worker", ["HGETALL", KEYS.job("j")]),
    ("worker", ["HSET", KEYS.adapters, "name", "x"]),
    ("worker", ["HGETALL", KEYS.registrations]),
    ("worker", ["SET", KEYS.leader, "me"]),
    ("worker", ["SCAN", 0]),
    # A store reads neither prompts nor answers.
    ("store", ["HGETALL", KEYS.body("r")]),
    ("store", ["GET", KEYS.tok("r")]),
    ("store", ["HGETALL", KEYS.req("r")]),
    ("store", ["XADD", KEYS.sub("batch"), "*", "b", "x"]),
    ("store", ["HGETALL", KEYS.api_keys]),
    ("store", ["HGETALL", KEYS.job("j")]),
    # A scheduler reads neither prompts nor answers nor keys.
    ("scheduler", ["HGETALL", KEYS.body("r")]),
    ("scheduler", ["GET", KEYS.tok("r")]),
    ("scheduler", ["XRANGE", KEYS.out("g"), "-", "+"]),
    ("scheduler", ["HGETALL", KEYS.job("j")]),
    ("scheduler", ["HGETALL", KEYS.api_keys]),
    ("scheduler", ["HGETALL", KEYS.registrations]),
    # A gateway creates no keys, grants itself no limits, and neither leads nor publishes.
    ("gateway", ["HSET", KEYS.api_keys, "hash", "x"]),
    ("gateway", ["HSET", KEYS.tenants, "acme", "x"]),
    ("gateway", ["SET", KEYS.leader, "me"]),
    ("gateway", ["HSET", KEYS.adapters, "name", "x"]),
    ("gateway", ["HSET", KEYS.bases, "x", "x"]),
    ("gateway", ["SCAN", 0]),
    # The operator's commands read no prompts, and retry nothing.
    ("operator", ["XRANGE", KEYS.dlq, "-", "+"]),
    ("operator", ["HGETALL", KEYS.req("r")]),
    ("operator", ["HGETALL", KEYS.body("r")]),
    ("operator", ["GET", KEYS.tok("r")]),
    ("operator", ["HGETALL", KEYS.job("j")]),
    *((user, command) for user in table() for command in (
        ["KEYS", "*"], ["FLUSHALL"], ["CONFIG", "GET", "*"], ["MONITOR"], ["ACL", "LIST"], ["SHUTDOWN"],
        ["SCRIPT", "FLUSH"], ["REPLICAOF", "h", 1], ["SUBSCRIBE", "c"], ["CLIENT", "KILL", "ID", 1], ["SAVE"],
        ["EVAL", "return redis.call('HGETALL', 'somebody:else')", 0], ["GET", "somebody:else"],
    )),
    (PROBE, ["HGETALL", KEYS.bases]),
    (PROBE, ["INFO"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("user", "command"),
    FORBIDDEN,
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value))[:40],
)
async def test_everything_else_is_refused(guarded: EmbeddedServer, user: str, command: Sequence[str | int]) -> None:
    url = url_of(guarded, user) if user != PROBE else f"unix://{PROBE}:none@{guarded.socket}"
    client = connect(url, timeout_s=60)
    try:
        assert await client.ping()
        with pytest.raises(Exception, match=r"(?i)no permission|can't access|NOPERM"):
            await client.execute_command(*command)
    finally:
        await client.aclose()


async def test_gateways_write_keys_where_operators_do_so_over_http(tmp_path: Path) -> None:
    server = start_embedded(tmp_path, durable=False, guarded=True, console_keys=True)
    try:
        bus = Bus(url_of(server, "gateway"))
        _, key = await bus.api_keys.create("acme", ["infer"])
        await bus.api_keys.set_tenant(Tenant(name="acme", concurrency=2))
        assert (await bus.api_keys.revoke(key.id)).tenant == "acme"
        with pytest.raises(NoPermissionError):
            await bus.lead("me:1", "me", 1000)
        await bus.close()
    finally:
        server.stop()


async def test_nobody_enters_without_the_password(guarded: EmbeddedServer) -> None:
    for address in (f"unix://{guarded.socket}", f"unix://gateway:wrong@{guarded.socket}"):
        client = connect(address, timeout_s=60)
        with pytest.raises(CONNECTION_ERRORS, match=r"authenticated|invalid username-password"):
            await client.hgetall(KEYS.bases)
        await client.aclose()


async def test_a_service_with_a_wrong_password_ends_instead_of_waiting(guarded: EmbeddedServer) -> None:
    bus = Bus(f"unix://gateway:wrong@{guarded.socket}")
    try:
        with pytest.raises(Internal, match="the queue refused this service"):
            await bus.server.reach(asyncio.Event())
    finally:
        await bus.close()


async def test_a_password_opens_one_user_only(guarded: EmbeddedServer) -> None:
    assert guarded.users is not None
    password = password_file(guarded.users, "worker").read_text()
    client = connect(f"unix://gateway:{password}@{guarded.socket}", timeout_s=60)
    with pytest.raises(CONNECTION_ERRORS, match="invalid username-password"):
        await client.ping()
    await client.aclose()


async def test_a_refusal_is_an_error_of_its_own(buses: dict[str, Bus]) -> None:
    """It is not a lost connection, which the services' loops would retry forever."""
    with pytest.raises(NoPermissionError):
        await buses["store"].get(KEYS.status, m.SchedulerStatus)
    with pytest.raises(ResponseError, match="No permissions") as refused:
        await buses["store"].inputs([make_submit("r")])
    assert not isinstance(refused.value, CONNECTION_ERRORS)
