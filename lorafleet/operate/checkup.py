"""The findings of `lorafleet doctor`: each judges a fact and suggests a fix. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lorafleet.shared.tables import count_text, size_text
from protocol.queue.connection.server import ServerFacts
from protocol.wire import messages as m

Level = Literal["ok", "skipped", "warning", "problem"]

MAX_SKEW_MS = 1000
"""Maximum clock difference in ms; beyond it, deadlines and estimated waits are wrong."""

MAX_ANSWER_MS = 20.0
"""Maximum round-trip time of the queue in ms; beyond it, every step and call is delayed noticeably."""

MAKE_ROOM = "free space on its disk (files can still be deleted), then check the server's log"

LEAST_FREE, LEAST_FREE_BYTES = 0.05, 2 << 30
"""Free fraction and free bytes below which a disk counts as nearly full."""

WEIGHTS_PART = 0.7
"""Fraction of a memory that weights may take; the rest is for caches, adapters and the workspace of a step."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    name: str
    level: Level
    text: str
    advice: str = ""  # the suggested fix; "" if none is needed


def of_queue(facts: ServerFacts) -> list[Finding]:
    """Judge the queue's server."""
    found = [Finding("queue", "ok", f"{facts.version} responds in {facts.answer_ms:.1f} ms")]
    if facts.answer_ms > MAX_ANSWER_MS:
        text = f"{facts.version} takes {facts.answer_ms:.0f} ms to respond, which delays every step"
        found = [Finding("queue", "warning", text, "run it close to the services, on a machine with spare capacity")]
    if facts.role != "master":
        text = f"this server is a {facts.role} and accepts no writes"
        found.append(
            Finding("queue role", "problem", text, "use the primary's URL, or the Sentinels': redis-sentinel://")
        )
    if facts.policy == "noeviction":
        found.append(Finding("queue eviction", "ok", "maxmemory-policy is noeviction"))
    else:
        text = f"maxmemory-policy is {facts.policy}: the server may evict requests, and services refuse to start"
        found.append(Finding("queue eviction", "problem", text, "CONFIG SET maxmemory-policy noeviction"))
    if not facts.appends:
        text = "appendonly is off: a restart of the server loses every request and API key"
        found.append(Finding("queue persistence", "warning", text, "CONFIG SET appendonly yes"))
    elif not facts.append_ok:
        text = "the server cannot write its append-only file and refuses all writes, so every call fails"
        found.append(Finding("queue persistence", "problem", text, MAKE_ROOM))
    else:
        found.append(Finding("queue persistence", "ok", "appendonly is on"))
    if not facts.snapshot_ok:
        text = "the server could not write its last snapshot; by default it then refuses all writes"
        found.append(Finding("queue snapshot", "problem", text, MAKE_ROOM))
    return [*found, _memory(facts), of_clock("queue clock", facts.ahead_ms)]


def _memory(facts: ServerFacts) -> Finding:
    used = size_text(facts.used_bytes)
    if not facts.max_bytes:
        text = f"{used} used, and maxmemory is not set: it may take all memory of its machine"
        return Finding("queue memory", "warning", text, "CONFIG SET maxmemory to less than the machine's memory")
    text = f"{used} of {size_text(facts.max_bytes)} used"
    if facts.used_bytes > (1 - 2 * LEAST_FREE) * facts.max_bytes:
        advice = "raise maxmemory, or lower the limit per tenant (tenant_bytes); a full queue refuses new calls"
        return Finding("queue memory", "problem", text, advice)
    return Finding("queue memory", "ok", text)


def of_history(state: str | None) -> list[Finding]:
    """Judge the database of the history by its state in a gateway's health; None: no problem."""
    if state is None:
        return []
    text = f"the database of --history is {state}: calls are served, and their history stays in the queue"
    return [Finding("history", "warning", text, "check the database, and the gateway's log for the reason")]


def of_clock(name: str, ahead_ms: float) -> Finding:
    """Judge a clock by its difference from this machine's. ahead_ms: that clock minus this one."""
    if abs(ahead_ms) <= MAX_SKEW_MS:
        return Finding(name, "ok", f"differs by {abs(ahead_ms):.0f} ms from this machine's")
    word = "ahead of" if ahead_ms > 0 else "behind"
    text = f"is {abs(ahead_ms) / 1000:.1f} s {word} this machine's: deadlines and estimated waits are wrong"
    return Finding(name, "problem", text, "synchronise both clocks with NTP (timedatectl set-ntp true)")


def of_members(
    beats: Mapping[str, m.WorkerBeat | None], status: m.SchedulerStatus | None, versions: Mapping[str, str], own: str
) -> list[Finding]:
    """Judge the fleet's members. versions: of gateways and stores, "" if unknown. own: version of this program."""
    alive = {beat.name: beat for beat in beats.values() if beat is not None}
    found: list[Finding] = []
    if status is None:
        advice = "start one: lorafleet serve scheduler"
        found.append(
            Finding("scheduler", "problem", "no scheduler is active: no request is assigned to a worker", advice)
        )
    else:
        found.append(Finding("scheduler", "ok", f"{status.leader.partition(':')[0] or 'one'} is active"))
    if not alive:
        text = "no worker is running: every call is refused"
        found.append(Finding("workers", "problem", text, "start one: lorafleet serve worker"))
    else:
        draining = sorted(name for name, beat in alive.items() if beat.draining)
        text = f"{len(alive)} running" + (f", draining: {', '.join(draining)}" if draining else "")
        all_drain = len(draining) == len(alive)
        advice = "lorafleet workers resume NAME" if all_drain else ""
        found.append(Finding("workers", "problem" if all_drain else "ok", text, advice))
    lost = sorted(wid for wid, beat in beats.items() if beat is None)
    if lost:
        text = f"{', '.join(lost)} stopped sending heartbeats"
        found.append(Finding("lost workers", "warning", text, "check their logs; a scheduler removes them within 4 s"))
    if status is not None and status.dead_letters:
        text = f"{count_text(status.dead_letters, 'request')} failed too often"
        found.append(Finding("dead letters", "warning", text, "lorafleet dlq list shows why; dlq retry requeues them"))
    reported = {f"worker {name}": beat.version for name, beat in alive.items()} | dict(versions)
    if status is not None:
        reported["scheduler"] = status.version
    return [*found, *_versions(reported, own)]


def of_bases(
    bases: Sequence[m.ServedModel], failures: Mapping[str, str], beats: Mapping[str, m.WorkerBeat | None]
) -> list[Finding]:
    """Judge every base that workers have reported, and those whose workers could not start. failures: name -> why."""
    found = [_of_base(base) for base in bases]
    advice = "see the log of its worker, correct that, and start it again"
    found += [Finding("base", "problem", f"{name} did not start: {why}", advice) for name, why in failures.items()]
    alive = [beat for beat in beats.values() if beat is not None and not beat.draining]
    served = {beat.base or bases[0].name for beat in alive if bases}
    for base in bases if len(bases) > 1 else ():
        if base.name not in served | failures.keys():
            text = f"{base.name} has no worker: its calls wait or are refused"
            advice = f"start one: lorafleet serve worker --model {base.model} --more-models …, or wait if it scales"
            found.append(Finding("base", "warning", text, advice))
    return found


def _of_base(base: m.ServedModel) -> Finding:
    """Judge the dtype and kernels of a base's workers."""
    text = f"{base.name} in {base.dtype} on {base.device}" + (f": {base.dtype_reason}" if base.dtype_reason else "")
    if base.device == "cpu" and base.dtype_reason and not base.kernels:
        advice = (
            "leave --kernels at auto, and install g++ or a wheel with native kernels; see the worker's log for details"
        )
        return Finding("base", "warning", f"{text}; it falls back to plain torch, several times slower", advice)
    text += f", with {base.kernels} kernels" if base.kernels else ""
    return Finding("base", "ok", text + (f"; {base.draft_model} drafts for it" if base.draft_model else ""))


def _versions(reported: Mapping[str, str], own: str) -> list[Finding]:
    others = {name: version for name, version in reported.items() if version and version != own}
    silent = sorted(name for name, version in reported.items() if not version)
    found: list[Finding] = []
    if others:
        text = ", ".join(f"{name} {version}" for name, version in sorted(others.items())) + f"; this is {own}"
        advice = "update workers first, then schedulers and stores, then gateways"
        found.append(Finding("versions", "warning", text, advice))
    elif reported:
        found.append(Finding("versions", "ok", f"{len(reported) - len(silent)} services run {own}"))
    if silent:
        text = f"version unknown: {', '.join(silent)}"
        found.append(
            Finding("versions", "warning", text, "run doctor on a machine that can reach them, or update them")
        )
    return found


def of_disk(name: str, path: str, free: int, total: int, keep_free: int) -> Finding:
    """Judge a disk; sizes in bytes. keep_free: the free-space reserve for uploads and adapters."""
    text = f"{size_text(free)} of {size_text(total)} free at {path}"
    if free < keep_free:
        text += f", less than the {size_text(keep_free)} to keep free: uploads and downloads are refused"
        return Finding(name, "problem", text, MAKE_ROOM)
    if free < LEAST_FREE * total or free < LEAST_FREE_BYTES:
        advice = "free some space, or move --data; set --store-quota-bytes to evict mirrored adapters"
        return Finding(name, "problem", text, advice)
    return Finding(name, "ok", text)


def of_model(num_bytes: int, free: Mapping[str, int], *, workers: int) -> list[Finding]:
    """Judge whether a model's weights fit. free: bytes by device ("memory", or a GPU). workers: on this machine."""
    found: list[Finding] = []
    for name, room in free.items():
        num = workers if name == "memory" else 1
        text = f"weights of {size_text(num_bytes)}" + (f" for each of {num} workers" if num > 1 else "")
        text += f", {size_text(room)} free"
        if num * num_bytes > room:
            advice = "use a smaller or quantised model (--quantization), fewer --workers, or a larger machine"
            found.append(Finding(f"model in {name}", "problem", text, advice))
        elif num * num_bytes > WEIGHTS_PART * room:
            advice = "little memory is left for caches and adapters: set --kv-cache-bytes, --adapter-pool-bytes"
            found.append(Finding(f"model in {name}", "warning", text, advice))
        else:
            found.append(Finding(f"model in {name}", "ok", text))
    return found


def of_compiler(machine: str, compiler: str | None, *, is_shipped: bool, is_built: bool) -> Finding:
    """Judge whether native kernels are available or can be compiled.

    machine: the processor's family. compiler: its path, None without one. is_shipped: whether the wheel includes
    kernels. is_built: whether they were compiled before.
    """
    name = "compiler"
    if is_shipped:
        return Finding(name, "ok", "not needed: the package includes native kernels")
    if machine not in ("x86_64", "aarch64"):
        text = f"native CPU kernels are for x86-64 and aarch64; this is {machine}, and falls back to slower plain torch"
        return Finding(name, "warning", text, "use a GPU, or a Linux machine with one of these CPUs")
    if compiler is not None:
        return Finding(name, "ok", f"{compiler} builds the native kernels")
    if is_built:
        return Finding(name, "ok", "not found, but the kernels are already built")
    text = "no C++ compiler, and no native kernels: falling back to slower plain torch"
    return Finding(
        name, "warning", text, "install g++ (apt-get install g++) or a wheel with native kernels, or set CXX"
    )


def worst(findings: Sequence[Finding]) -> Level:
    """Return the worst level; "skipped" counts as "ok"."""
    levels = {finding.level for finding in findings}
    return "problem" if "problem" in levels else "warning" if "warning" in levels else "ok"
