"""Run every attack on a fleet for a while, and report its effect on an honest tenant: `make hostile`.

The victim is alone before and after each attack, so that both cases are measured in the same minute. The fleet serves a
model whose steps take as long as those of real models. The attackers' process has a lower CPU priority than the fleet
and the victim, since its own computation is not part of the fleet's load. Work that the fleet does for an attacker
counts.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hostile.arena import Trial, arena_in
from safetensors.torch import load_file, save_file

from chaos.report import machine
from lorafleet.quickstart import fetch_quickstart_model
from protocol.runtime.settings import Settings

MEMBERS = ("gateway", "gateway's children", "w0", "store", "queue")
COMPUTING = ("gateway", "w0", "store", "scheduler", "queue", "attacker")
WANTED = 2.0
"""Target: maximum ratio of the victim's p99 gap during an attack to its p99 gap alone."""

SETTINGS = {
    "dtype": "bfloat16",
    "kv_cache_bytes": 1 << 30,
    "adapter_pool_bytes": 256 << 20,
    "adapter_host_bytes": 256 << 20,
}
"""Settings for a model larger than that of the tests; its data types are those that `up` would choose."""

LOWEST = 19
"""Niceness of processes with lowered priority."""


def main() -> int:
    """Run the command line. The exit code is 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="python -m hostile", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="that rounds of each attack are begun for")
    parser.add_argument("--alone", type=float, default=6.0, help="seconds that the victim is alone between attacks")
    parser.add_argument("--attacks", default="1-", help="numbers of the attacks to make, such as 1-14 or 5-9,28-")
    parser.add_argument("--only", default="", help="part of the names of the attacks to make")
    parser.add_argument("--model", type=Path, help="folder of the model; default: the quickstart's, each layer twice")
    parser.add_argument("--out", type=Path, default=Path("build/hostile/report.md"), help="file for the report")
    args = parser.parse_args()
    wanted = [_range_of(text) for text in args.attacks.split(",")]
    with tempfile.TemporaryDirectory(prefix="lorafleet-hostile-") as folder:
        model = args.model or deepened(fetch_quickstart_model(Settings().data / "models"), Path(folder) / "twice")
        trials = asyncio.run(_attack(Path(folder), model, args.seconds, args.alone, wanted, args.only))
    report = as_markdown(trials, " ".join(sys.argv[1:]))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(report)
    print(report)
    return 1 if any(trial.wrong for trial in trials) else 0


def _range_of(text: str) -> range:
    first, dash, last = text.partition("-")
    return range(int(first), int(last or (sys.maxsize if dash else first)) + 1)


def deepened(model: Path, folder: Path) -> Path:
    """Write a copy of a model with every layer doubled, which doubles the time of a step; return its folder."""
    shutil.copytree(model, folder)
    config = json.loads((model / "config.json").read_text())
    num_layers = config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2 * num_layers}))
    weights = load_file(model / "model.safetensors")
    twice = {
        name.replace(f".layers.{layer}.", f".layers.{number}."): tensor.clone()
        for name, tensor in weights.items()
        for layer in map(int, re.findall(r"\.layers\.(\d+)\.", name))
        for number in (2 * layer, 2 * layer + 1)
    }
    save_file({name: t for name, t in weights.items() if ".layers." not in name} | twice, folder / "model.safetensors")
    return folder


async def _attack(
    folder: Path, model: Path, seconds: float, alone_s: float, numbers: Sequence[range], only: str
) -> list[Trial]:  # fmt: skip
    trials: list[Trial] = []
    async with arena_in(folder, model, **SETTINGS) as arena:
        with giving_way():
            await arena.rest(alone_s)
            for number, (attack, key) in enumerate(arena.attacks(), start=1):
                if any(number in part for part in numbers) and only in attack.name:
                    trial = await arena.attack(attack, seconds, key)
                    trial.alone += await arena.rest(alone_s)
                    trials.append(trial)
                    print(_row(trial), *trial.wrong, sep="\n", flush=True)
                    if arena.ended():
                        break
    return trials


@contextmanager
def giving_way() -> Iterator[None]:
    """Run this thread and this session at idle priority during the block.

    Linux weighs sessions before processes (sched_autogroup), so lowering the priority of a process is not enough.
    """
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    group = Path("/proc/self/autogroup")
    nice = group.read_text().split()[-1] if group.exists() else ""
    _set_nice(group, str(LOWEST))
    try:
        yield
    finally:
        _set_nice(group, nice)


def _set_nice(group: Path, nice: str) -> None:
    for _ in range(10):
        with suppress(BlockingIOError):  # limited to ten changes per second on the whole machine
            if nice:
                group.write_text(nice)
            return
        time.sleep(0.1)
    raise TimeoutError(f"{group} cannot be written")


def as_markdown(trials: Sequence[Trial], words: str) -> str:
    """Return the report of trials."""
    wrong = [f"- {trial.name}: {what}" for trial in trials for what in trial.wrong]
    gaps = [len(seen.gaps_s) for trial in trials for seen in (trial.alone, trial.beside)]
    num_unnoticed = sum(slowdown(trial) <= WANTED for trial in trials)
    lines = [
        f"`python -m hostile {words}`".replace(" `", "`") + f" on {machine()}, {datetime.date.today()}: {len(trials)} "
        f"attacks, {min(gaps, default=0)} to {max(gaps, default=0)} gaps each, alone and beside. p99 at most "
        f"{WANTED:g} × in {num_unnoticed}. **Violations: {len(wrong)}.**",
        "",
        "| attack | p99 gap, ms: alone → beside | × | p50 gap | first token p50, ms | tokens/s | /health p99, ms "
        f"| attacker got | CPU, % of a core: {', '.join(COMPUTING)} | RSS, MB: {', '.join(MEMBERS)} |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *map(_row, trials),
        "",
        *wrong,
    ]
    return "\n".join(lines).rstrip() + "\n"


def slowdown(trial: Trial) -> float:
    """Return the ratio of the victim's p99 gap during an attack to that alone."""
    return trial.beside.gap_s(0.99) / trial.alone.gap_s(0.99)


def _row(trial: Trial) -> str:
    alone, beside = trial.alone, trial.beside
    p99, p50 = (f"{1000 * alone.gap_s(q):.0f} → {1000 * beside.gap_s(q):.0f}" for q in (0.99, 0.5))
    first = f"{1000 * alone.first_s(0.5):.0f} → {1000 * beside.first_s(0.5):.0f}"
    health = f"{1000 * alone.answer_s(0.99):.0f} → {1000 * beside.answer_s(0.99):.0f}"
    told = ", ".join(f"{num} × {what}" for what, num in sorted(trial.told.items()))
    cpu = ", ".join(f"{100 * trial.cpu_s[name] / beside.seconds:.0f}" for name in COMPUTING)
    rss = ", ".join(f"{trial.before[name] >> 20} → {trial.largest[name] >> 20}" for name in MEMBERS)
    ratio = f"{slowdown(trial):.1f}" if slowdown(trial) <= WANTED else f"**{slowdown(trial):.1f}**"
    rates = f"{alone.rate:.0f} → {beside.rate:.0f}"
    cells = [trial.name, p99, ratio, p50, first, rates, health, told, cpu, rss]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
