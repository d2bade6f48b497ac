"""Attack a fleet in every way for a while each, and write what its victim had of it: `make hostile`."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hostile.arena import Trial, arena_in

from chaos.report import machine

ALONE_S = 5.0
MEMBERS = ("gateway", "gateway's children", "w0", "store", "queue")


def main() -> int:
    """Run as the arguments say. Exit code 1 when anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m hostile", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="that rounds of each attack are begun for")
    parser.add_argument("--only", default="", help="part of the names of the attacks to make")
    parser.add_argument("--out", type=Path, default=Path("build/hostile/report.md"), help="file for the report")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lorafleet-hostile-") as folder:
        trials = asyncio.run(_attack(Path(folder), args.seconds, args.only))
    report = as_markdown(trials, " ".join(sys.argv[1:]))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(report)
    print(report)
    return 1 if any(trial.wrong for trial in trials) else 0


async def _attack(folder: Path, seconds: float, only: str) -> list[Trial]:
    trials: list[Trial] = []
    async with arena_in(folder) as arena:
        for attack, key in arena.attacks():
            if only in attack.name:
                await arena.rest(ALONE_S)
                trials.append(await arena.attack(attack, seconds, key))
                print(_row(trials[-1]), *trials[-1].wrong, sep="\n", flush=True)
                if arena.ended():
                    break
    return trials


def as_markdown(trials: Sequence[Trial], words: str) -> str:
    """Return the report of some trials."""
    wrong = [f"- {trial.name}: {what}" for trial in trials for what in trial.wrong]
    lines = [
        f"`python -m hostile {words}`".replace(" `", "`") + f" on {machine()}, {datetime.date.today()}: {len(trials)} "
        f"attacks. **Violations: {len(wrong)}.**",
        "",
        "| attack | gap p50, ms: alone → beside | p99 | tokens/s | /health p99, ms | attacker was told "
        f"| RSS, MB: {', '.join(MEMBERS)} |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *map(_row, trials),
        "",
        *wrong,
    ]
    return "\n".join(lines).rstrip() + "\n"


def _row(trial: Trial) -> str:
    alone, beside = trial.alone, trial.beside
    gaps = [f"{1000 * alone.gap_s(q):.0f} → {1000 * beside.gap_s(q):.0f}" for q in (0.5, 0.99)]
    health = f"{1000 * alone.answer_s(0.99):.0f} → {1000 * beside.answer_s(0.99):.0f}"
    told = ", ".join(f"{num} × {what}" for what, num in sorted(trial.told.items()))
    rss = ", ".join(f"{trial.before[name] >> 20} → {trial.largest[name] >> 20}" for name in MEMBERS)
    cells = [trial.name, *gaps, f"{alone.rate:.0f} → {beside.rate:.0f}", health, told, rss]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
