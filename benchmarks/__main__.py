"""Run the benchmarks that need only this repository, one after the other.

    python -m benchmarks [--model FOLDER] [--short]      # `make bench` runs the short set

Each benchmark runs in its own process, so that it shares no memory and threads with another.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.common import report
from benchmarks.common.fleet import quickstart_model
from protocol.runtime.environment import COMPUTE, HUB_CACHE, child_environment

FULL = (
    "engine.kernels", "engine.distinct_adapters", "fleet.adapters", "fleet.cold_loads", "fleet.hit_rate",
    "fleet.mixed_ranks", "fleet.fairness", "fleet.prediction", "fleet.control_plane",
)  # fmt: skip
SHORT = ("engine.distinct_adapters", "fleet.adapters", "fleet.cold_loads", "fleet.mixed_ranks", "fleet.control_plane")
TAKES_NO_MODEL = ("engine.kernels",)  # nor a short run


def command(name: str, model: str, out: str, short: bool) -> list[str]:
    """Return the command line of one benchmark."""
    flags = [] if name in TAKES_NO_MODEL else [f"--model={model}", *(["--short"] if short else [])]
    return [sys.executable, "-m", f"benchmarks.{name}", f"--out={out}", *flags]


def main() -> None:
    """Run the benchmarks. Raises CalledProcessError if one fails."""
    args = report.parser(__doc__).parse_args()
    model = args.model or quickstart_model()
    environment = child_environment(*COMPUTE, *HUB_CACHE)
    for name in SHORT if args.short else FULL:
        print(f"\n== {name}", flush=True)
        subprocess.run(command(name, str(model), str(args.out), args.short), check=True, env=environment)


if __name__ == "__main__":
    main()
