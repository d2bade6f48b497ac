"""`python -m examples.tours [NAME…]`: run third-party programs against a fleet, and report which checks passed.

Without `URL` in the environment it starts and stops the fleets that the programs need: one of the quickstart model with
the example adapters, one of a small encoder, and one whose model follows scripts in prompts, for agents. With `URL`,
and `KEY` if needed, it uses that fleet, also for agents: its base model must be able to do their task. `ADAPTER`
defaults to the first adapter that the fleet lists. `EMBEDDER_URL`, with `EMBEDDER_ADAPTER`, is a fleet of an encoder
with the same key. `TOKENIZER` is the base model's, for lm-eval.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from examples.tours.environments import NotInstallableError, command, install, is_javascript, version
from examples.tours.fleets import ROOT, acting_fleet, embedding_fleet, first_adapter, quickstart_model, text_fleet
from examples.tours.programs import PROGRAMS, Program

HERE = Path(__file__).parent
TOUR_S = 600.0
LINE = re.compile(r"^\[(ok|failed)\] (.+)$", re.MULTILINE)


@dataclass(slots=True)
class Result:
    """The result of one program. It passed if at least one check ran and none failed."""

    program: Program
    version: str = ""
    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    missing: str = ""  # why it could not be installed

    @property
    def word(self) -> str:
        """The result in one or two words."""
        if self.missing:
            return "not installable"
        return "failed" if self.failed or not self.passed else "passed"


def main() -> int:
    """Run the chosen programs; return 1 if a check failed, 0 otherwise."""
    parser = argparse.ArgumentParser(description="Run other people's programs against a fleet.")
    names = [program.name for program in PROGRAMS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all if none is named: {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "tours", help="environments and report.md")
    parser.add_argument("--remove", action="store_true", help="remove each environment after its tour")
    args = parser.parse_args()
    unknown = sorted({*args.names} - {*names})
    if unknown:
        parser.error(f"no program is named {', '.join(unknown)}; there are {', '.join(names)}")
    out = args.out.resolve()
    programs = [program for program in PROGRAMS if not args.names or program.name in args.names]
    results: list[Result] = []
    with ExitStack() as stack:
        variables = {**os.environ, "PYTHONPATH": str(HERE)}
        if not variables.get("URL"):
            variables |= start({fleet for program in programs for fleet in program.fleets}, out, stack)
        for prefix in ("", "EMBEDDER_"):
            url = variables.get(f"{prefix}URL")
            if url and not variables.get(f"{prefix}ADAPTER"):
                variables[f"{prefix}ADAPTER"] = first_adapter(url, variables.get("KEY", ""))
        for program in programs:
            results.append(tour(program, out / program.name, variables))
            if args.remove:
                shutil.rmtree(out / program.name, ignore_errors=True)
    report = table(results)
    (out / "report.md").write_text(report)
    print(f"\n{report}\n{out / 'report.md'}")
    return int(any(result.word == "failed" for result in results))


def start(fleets: set[str], out: Path, stack: ExitStack) -> dict[str, str]:
    """Start fleets, which `stack` stops; return the environment variables that describe them to scripts."""
    model = quickstart_model()
    variables = {"TOKENIZER": str(model)}
    if "text" in fleets:
        variables |= {"URL": stack.enter_context(text_fleet(model, out / "data")), "ADAPTER": "pirate"}
    if "embedding" in fleets:
        variables["EMBEDDER_URL"] = stack.enter_context(embedding_fleet(out / "embedder"))
    if "acting" in fleets:
        variables["ACTOR_URL"] = stack.enter_context(acting_fleet(model, out / "actor"))
    return variables


def tour(program: Program, folder: Path, variables: dict[str, str]) -> Result:
    """Install `program` in `folder` if necessary, run its script and return the passed and failed checks."""
    result = Result(program)
    print(f"\n{program.name}: ", end="", flush=True)
    try:
        install(program, folder)
    except NotInstallableError as error:
        result.missing = str(error)
        print(f"not installable: {error}")
        return result
    result.version = version(program, folder)
    print(result.version, flush=True)
    script = HERE / program.script
    if is_javascript(program):  # Node.js looks for packages next to the script
        for shared in {script, script.with_name("checks.mjs")}:
            shutil.copy(shared, folder)
        script = folder / script.name
    log = folder / "tour.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command(program, folder, script), env=variables, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            text, _ = process.communicate(timeout=TOUR_S)
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
            result.failed.append(f"the script took longer than {TOUR_S:.0f} s")
    for word, line in LINE.findall(text):
        print(f"  {word}: {line}")
        (result.passed if word == "ok" else result.failed).append(line)
    if process.returncode != 0 and not result.failed:
        last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
        result.failed.append(f"the script ended with {process.returncode}: {' '.join(last)}")
    if result.failed:
        print(f"  {log}")
    return result


def table(results: list[Result]) -> str:
    """Return the report in Markdown: a row per program."""
    today = datetime.datetime.now(tz=datetime.UTC).date()
    head = "| program | version | result | checks that passed | that failed, or why it was not installed |"
    rows = [f"`python -m examples.tours`, {today}.", "", head, "| --- | --- | --- | --- | --- |"]
    for result in results:
        count = f"{len(result.passed)} of {len(result.passed) + len(result.failed)}"
        word = result.word if result.missing else f"{result.word}, {count}"
        cells = [result.program.name, result.version, word, "; ".join(result.passed)]
        cells.append(result.missing or "; ".join(result.failed))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
