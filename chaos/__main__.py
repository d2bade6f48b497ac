"""Inject random faults into a fleet under load, check everything, write a report. Exit code 1 if a check failed."""

from __future__ import annotations

import argparse
import asyncio
import logging
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import msgspec

from chaos.fleet import Shape
from chaos.report import as_markdown, report_of
from chaos.run import Plan, Tally, prepared
from protocol.runtime.service import set_up_logging

RANKS = {"one": 1, "three": 3, "eight": 8, "sixteen": 16}


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=50, help="kills, stops, drains and power cuts")
    parser.add_argument("--every", type=float, default=3.0, help="mean seconds from one to the next")
    parser.add_argument("--alone", action="store_true", help="begin none before the one before is over")
    parser.add_argument("--kills-only", action="store_true", help="of the faults after the first of each sort")
    parser.add_argument("--clients", type=int, default=8, help="calls at a time")
    parser.add_argument("--attackers", type=int, default=0, help="tenants that attack meanwhile; then API keys are on")
    parser.add_argument("--lines", type=int, default=0, help="of the batches that run meanwhile, one after the other")
    parser.add_argument("--adapters", type=int, default=0, help="that these lines ask; 0: those that clients ask")
    parser.add_argument("--turns", type=int, default=0, help="of the conversations that are held meanwhile")
    parser.add_argument("--stores", action="store_true", help="files are stored, and adapters uploaded, meanwhile")
    parser.add_argument("--only", default="", help="the kind of members that are hit: queue, worker …; default: all")
    parser.add_argument("--replicated", action="store_true", help="a queue of three servers, which fails over")
    parser.add_argument("--how", default="", help="what is done to them: kill,partition …; default: all")
    parser.add_argument("--clocks", action="store_true", help="the wall clocks of members jump by an hour")
    parser.add_argument(
        "--bases", type=int, default=1, help="base models, of several the last an encoder; fewer workers swap"
    )
    parser.add_argument("--gateways", type=int, default=2)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1, help="of faults and calls")
    parser.add_argument("--minutes", type=float, default=240.0, help="begin no more faults after so long")
    parser.add_argument("--out", type=Path, default=Path("build/chaos"), help="folder for the report and the logs")
    args = parser.parse_args()
    shape = Shape(args.gateways, 2, tuple(f"w{i}" for i in range(args.workers)))
    plan = Plan(
        args.faults, args.every, args.clients, args.seed, args.minutes * 60, shape, args.alone, args.kills_only,
        args.lines, args.adapters, args.turns, args.only, args.replicated,
        tuple(filter(None, args.how.split(","))), args.clocks, args.stores, args.attackers,
        (*(f"base-{number}" for number in range(1, args.bases - 1)), *(["encoder"] if args.bases > 1 else [])),
        "encoder" if args.bases > 1 else "",
    )  # fmt: skip
    set_up_logging("chaos", "info")
    logging.getLogger("httpx2").setLevel("WARNING")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="lorafleet-chaos-") as scratch:
        args.out.mkdir(parents=True, exist_ok=True)
        try:
            tally = asyncio.run(_run(plan, Path(scratch)))
        finally:
            for log in Path(scratch).glob("**/*.log"):
                shutil.copy(log, args.out / log.name)
    report = report_of(tally, plan, sys.argv[1:])
    (args.out / "report.json").write_bytes(msgspec.json.encode(report))
    (args.out / "report.md").write_text(as_markdown(report))
    print(as_markdown(report))
    return 1 if tally.violations else 0


async def _run(plan: Plan, folder: Path) -> Tally:
    from transformers import AutoModel

    from tests.helpers.factories import make_adapter, make_encoder_adapter, make_tiny_encoder, make_tiny_model

    model = make_tiny_model(folder / "model", max_len=2048)
    for seed, (name, rank) in enumerate(RANKS.items(), start=1):
        make_adapter(folder / "adapters" / name, model, rank=rank, seed=seed)
    of_lines = [f"line-{number:02}" for number in range(plan.num_adapters)]
    for number, name in enumerate(of_lines):
        make_adapter(folder / "adapters" / name, model, rank=8, seed=100 + number)
    if plan.encoder:
        encoder = AutoModel.from_pretrained(make_tiny_encoder(folder / plan.encoder))
        make_encoder_adapter(folder / "adapters" / f"of-{plan.encoder}", encoder)
    decoders = [name for name in plan.more_bases if name != plan.encoder]
    for number, name in enumerate(decoders, start=1):  # different hidden sizes: no adapter fits another base
        further = make_tiny_model(folder / name, hidden=64 + 32 * (number % 3), seed=number, max_len=2048)
        make_adapter(folder / "adapters" / f"of-{name}", further, rank=8, seed=200 + number)
    async with prepared(plan, folder, model, list(RANKS), of_lines) as run:
        return await run.run()


if __name__ == "__main__":
    sys.exit(main())
