"""The users of the queue's server: the exact rights of each service.

This table is the only place that defines them. A server that is started with its ACL file refuses everything else with
NOPERM, also inside scripts. Code that uses a new key or command adds it here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from protocol.wire.keys import Keys

PROBE = "probe"
"""May only ping the server and needs no password: for a container's health check."""

_CONNECTION = ("client|setinfo", "client|setname", "ping", "select")
_SCRIPTS = ("discard", "eval", "evalsha", "exec", "multi", "script|load", "time", "unwatch", "watch")
_DATA = (
    "append", "del", "exists", "expire", "get", "getrange", "hdel", "hexists", "hget", "hgetall", "hincrby",
    "hincrbyfloat", "hkeys", "hlen", "hmget", "hscan", "hset", "hsetnx", "hvals", "incr", "mget", "pexpire",
    "pexpireat", "pexpiretime", "pttl", "sadd", "scard", "set", "smembers", "srem", "strlen", "unlink", "xadd", "xdel",
    "xlen", "xrange", "xread", "xrevrange", "xtrim", "zadd", "zcard", "zcount", "zincrby", "zrange", "zrangebyscore",
    "zrank", "zrem", "zremrangebyscore", "zrevrange", "zrevrank", "zscore",
)  # fmt: skip
COMMANDS = (*_CONNECTION, *_SCRIPTS, *_DATA, "info")
"""The commands of every service; services differ in the keys that they may access. `info` is in the category of
dangerous commands, but only describes the server: its run id, memory and eviction policy are read.
"""


@dataclass(frozen=True, slots=True)
class Rights:
    """The rights of one user. Patterns are in the order in which the server tries them: the most used first."""

    writes: tuple[str, ...]  # patterns of keys that it may read and write
    reads: tuple[str, ...] = ()  # patterns of keys that it may only read
    adds: tuple[str, ...] = ()  # patterns of keys that it may only write
    scans: bool = False  # whether it may list the names of all keys

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands that the user may run."""
        return (*COMMANDS, "scan") if self.scans else COMMANDS


def table(*, console_keys: bool = False) -> dict[str, Rights]:
    """Return the rights by name of user: the four services, and the operator of the command line.

    console_keys: gateways may also write API keys and tenants, for operators who change them over HTTP.
    """
    k = Keys()
    administered = (k.api_keys, k.tenants)
    answers = (k.tok("*"), k.lp("*"), k.plp("*"))
    request = (k.req("*"), *answers)
    use = k.quota("*")  # with all quotas of a tenant, which every script that ends a request updates
    # Scripts that end a job note it for webhooks; `old_ends` is for services of the previous version that still run.
    ends = (k.ends, k.ends_of("*"), k.old_ends)
    usage = k.usage_tenants("*")  # with the hashes of tenants; every script that ends a request adds to them
    history = k.history("*")  # with refusals; every script that ends a request adds to it and reads when one last did
    return {
        "gateway": Rights(
            # The empty name stands for a missing Idempotency-Key among the keys of `submit.lua`.
            writes=(
                *request, k.tag, k.call("*"), k.body("*"), k.sub("*"), k.out("*"), use, usage, k.histories, history,
                k.history_writer, k.history_problem, k.history_deleted,
                k.job("*"), k.jobs("*"), k.idem("*", "*"), "", k.gateway_beat("*"), k.gateways, k.registrations,
                k.registered("*", "*"), k.pins, k.adapter_events, k.file("*"), k.files("*"), k.file_expiry,
                k.batch("*"), k.batches("*"), k.open_batches, k.conversation("*"), k.conversations("*"), k.turns,
                k.hooks("*"), k.ends, k.ends_of("*"), k.outboxes, k.outbox("*"), k.outbox_times("*"),
                k.undelivered("*"), k.sender, k.added_bases, k.old_hooks, k.old_ends, k.old_cursor, k.old_deliveries,
                k.old_delivery_times, k.dlq, k.audit, k.tenants_audit, *(administered if console_keys else ()),
            ),
            reads=(
                *(() if console_keys else administered), k.ended, k.adapters, k.adapters_stamp, k.adapter("*"),
                k.adapter_use("*"), k.workers, k.worker_beat("*"), k.stores, k.store_beat("*"), k.bases,
                k.status, k.work("*"), k.own("*"), k.residency("*"),
            ),
            adds=(k.ctl("*"), k.own("*"), k.work("*"), k.ended),
        ),
        "scheduler": Rights(
            writes=(
                k.req("*"), k.tag, k.call("*"), k.sub("*"), k.work("*"), k.own("*"), k.ctl("*"), k.ended, k.leader,
                k.leader_epoch, k.status, use, usage, k.histories, k.workers, k.worker_beat("*"), k.gateways, k.dlq,
                k.bases,
            ),
            reads=(k.gateway_beat("*"), k.adapter("*"), k.added_bases),
            # The scheduler sets the expiry of what it ends.
            adds=(*answers, k.body("*"), k.out("*"), *ends, history, k.audit),
            scans=True,
        ),
        "worker": Rights(
            writes=(
                *request, k.tag, k.call("*"), k.own("*"), k.work("*"), k.ended, use, usage, k.histories, k.ctl("*"),
                k.worker_beat("*"), k.workers, k.bases, k.adapter_use("*"), k.residency("*"),
            ),
            reads=(k.body("*"), k.stores, k.store_beat("*"), k.added_bases),
            adds=(k.out("*"), k.body("*"), k.sub("*"), k.dlq, k.adapter_events, *ends, history),
        ),
        "store": Rights(
            writes=(
                k.tag, k.adapters, k.adapters_stamp, k.adapter("*"), k.registrations, k.fetching("*"), k.pins,
                k.adapter_events, k.store_beat("*"), k.stores,
            ),
            reads=(k.bases, k.added_bases, k.workers, k.worker_beat("*")),
            adds=(k.ctl("*"),),
            scans=True,
        ),
        "operator": Rights(
            writes=(k.tag, k.api_keys, k.tenants),
            reads=(
                k.status, k.workers, k.worker_beat("*"), k.gateways, k.gateway_beat("*"), k.stores, k.store_beat("*"),
                k.bases, k.added_bases,
            ),
            adds=(k.audit,),
        ),
    }  # fmt: skip


SERVERS = {
    "replica": "+psync +replconf +ping",
    "sentinel": "allchannels +multi +slaveof +ping +exec +subscribe +config|rewrite +role +publish +info"
    " +client|setname +client|kill +script|kill",
}
"""Users of a queue of several servers, and their rights: replicas read the primary; Sentinels watch it and change which
server it is (as redis.io/docs/latest/operate/oss_and_stack/management/sentinel lists it).
"""


def acl(passwords: Mapping[str, str], *, console_keys: bool = False) -> str:
    """Return the lines of an ACL file. It contains hashes of the passwords, which must be random and long.

    passwords: one for each user of `table`, and for the users of `SERVERS` if there are several servers. console_keys:
    as for `table`. Only `PROBE` needs no password.
    """
    lines = ["user default reset", f"user {PROBE} reset on nopass +ping"]
    for name, rights in table(console_keys=console_keys).items():
        rules = [f"~{pattern}" for pattern in rights.writes]
        rules += [f"%R~{pattern}" for pattern in rights.reads]
        rules += [f"%W~{pattern}" for pattern in rights.adds]
        rules += [f"+{command}" for command in rights.commands]
        password = hashlib.sha256(passwords[name].encode()).hexdigest()
        lines.append(f"user {name} reset on #{password} {' '.join(rules)}")
    for name, rules in SERVERS.items():
        if name in passwords:
            lines.append(f"user {name} reset on #{hashlib.sha256(passwords[name].encode()).hexdigest()} {rules}")
    return "\n".join([*lines, ""])
