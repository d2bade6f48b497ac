"""`lorafleet batch` runs a file of calls as a batch: uploads it, shows its progress, downloads the answers."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lorafleet.shared.api import Api, add_flags, add_json_flag, run_action
from lorafleet.shared.parser import ALIASES, Parser
from lorafleet.shared.tables import print_list
from protocol.wire.errors import BadRequest

ENDED = ("completed", "failed", "expired", "cancelled")
POLL_S = 1.0
MAX_SHOWN = 10
"""Maximum number of problems of an input file that are printed."""


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    actions = parser.add_subparsers(metavar="run|list|show|cancel", required=True)
    start = actions.add_parser("run", help="upload a file of calls, wait for the answers and download them")
    start.description = (
        "Each line of the file is a call: {custom_id, method, url, body}. Exit code: 0 if every line was answered,"
        " 1 if some failed, 130 if interrupted; the batch then continues, and `lorafleet batch show` shows it."
    )
    start.add_argument("file", metavar="FILE.jsonl", type=Path, help="input file, one call per line")
    start.add_argument("--model", help="model for lines that name none")
    start.add_argument("--endpoint", help="endpoint of all lines (default: the url of the first line)")
    start.add_argument("--out", type=Path, metavar="FILE", help="file for the answers (default: FILE.output.jsonl)")
    start.add_argument("--errors", type=Path, metavar="FILE", help="file for the errors (default: FILE.errors.jsonl)")
    start.set_defaults(do=_run)
    listing = actions.add_parser("list", aliases=ALIASES, help="list batches, newest first")
    listing.add_argument("--limit", type=int, default=20, help="maximum number listed (default: %(default)s)")
    listing.set_defaults(do=_list)
    show = actions.add_parser("show", help="show a batch as JSON, and download its results if it has ended")
    show.add_argument("--out", type=Path, metavar="FILE", help="file for the answers (default: not downloaded)")
    show.add_argument("--errors", type=Path, metavar="FILE", help="file for the errors (default: not downloaded)")
    show.set_defaults(do=_show, json=True)
    cancel = actions.add_parser("cancel", help="cancel a batch; its results so far are kept")
    cancel.set_defaults(do=_cancel)
    for action in (show, cancel):
        action.add_argument("batch", metavar="ID", help="id of the batch, batch_…")
    for action in (start, listing, cancel):
        add_json_flag(action)
    for action in (start, listing, show, cancel):
        add_flags(action)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code. Raises the fleet's error response, and Unavailable."""
    return run_action(args, _code if args.do is _run else None)


def _run(api: Api, args: argparse.Namespace) -> dict[str, Any]:
    with _lines(args.file, args.model) as (file, first_url):
        endpoint = args.endpoint or first_url
        if not endpoint:
            raise BadRequest(f"{args.file}: the first line has no url: give --endpoint")
        uploaded = api.ask("POST", "/v1/files", files={"file": (args.file.name, file)}, data={"purpose": "batch"})
    asked = {"input_file_id": uploaded["id"], "endpoint": endpoint, "completion_window": "24h"}
    batch = api.ask("POST", "/v1/batches", json=asked)
    print(f"{batch['id']} was created from {args.file}", file=sys.stderr)
    try:
        batch = _follow(api, batch)
    except KeyboardInterrupt:
        print(f"\nthe batch continues: `lorafleet batch show {batch['id']}`", file=sys.stderr)
        raise
    out = args.out or args.file.with_suffix(".output.jsonl")
    errors = args.errors or args.file.with_suffix(".errors.jsonl")
    written = _download(api, batch, out, errors)
    if not args.json:
        print("\n".join(map(str, written)))
    _tell(batch)
    return batch


def _code(batch: dict[str, Any]) -> int:
    """Return the exit code for a batch that has ended."""
    return 0 if batch["status"] == "completed" and not batch["request_counts"]["failed"] else 1


def _follow(api: Api, batch: dict[str, Any]) -> dict[str, Any]:
    """Show the progress of a batch until it has ended; return it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("validating", total=None)
        while batch["status"] not in ENDED:
            time.sleep(POLL_S)
            batch = api.ask("GET", f"/v1/batches/{batch['id']}")
            counts = batch["request_counts"]
            done = counts["completed"] + counts["failed"]
            progress.update(task, description=batch["status"], completed=done, total=counts["total"] or None)
    return batch


def _download(api: Api, batch: dict[str, Any], out: Path | None, errors: Path | None) -> list[Path]:
    """Write a batch's results to files; return the files that were written."""
    written: list[Path] = []
    for key, target in (("output_file_id", out), ("error_file_id", errors)):
        if batch[key] and target is not None:
            api.download(f"/v1/files/{batch[key]}/content", target)
            written.append(target)
    return written


def _tell(batch: dict[str, Any]) -> None:
    """Print the outcome of a batch."""
    counts, usage = batch["request_counts"], batch["usage"]
    for problem in ((batch["errors"] or {}).get("data") or [])[:MAX_SHOWN]:
        where = f"line {problem['line']}: " if problem["line"] else ""
        print(f"{where}{problem['message']} ({problem['code']})", file=sys.stderr)
    print(
        f"{batch['status']}: {counts['completed']} of {counts['total']} lines answered, {counts['failed']} failed;"
        f" {usage['input_tokens']} input tokens, {usage['output_tokens']} output tokens",
        file=sys.stderr,
    )


def _list(api: Api, args: argparse.Namespace) -> list[dict[str, Any]]:
    page = api.ask("GET", "/v1/batches", params={"limit": args.limit})
    if not args.json:
        rows = [
            [
                batch["id"],
                batch["status"],
                batch["endpoint"],
                *(str(batch["request_counts"][name]) for name in ("total", "completed", "failed")),
            ]
            for batch in page["data"]
        ]
        print_list(("id", "status", "endpoint", "lines", "answered", "failed"), rows, "no batches")
    return page["data"]


def _show(api: Api, args: argparse.Namespace) -> dict[str, Any]:
    batch = api.ask("GET", f"/v1/batches/{args.batch}")
    for written in _download(api, batch, args.out, args.errors):
        print(written, file=sys.stderr)
    return batch


def _cancel(api: Api, args: argparse.Namespace) -> dict[str, Any]:
    batch = api.ask("POST", f"/v1/batches/{args.batch}/cancel")
    if not args.json:
        print(f"{batch['id']} is {batch['status']}")
    return batch


@contextmanager
def _lines(path: Path, model: str | None) -> Iterator[tuple[IO[bytes], str]]:
    """Open a file of calls, with `model` set where missing; yield it and the first line's url. Raises BadRequest."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise BadRequest(f"cannot read {path}: {error.strerror}") from error
    with file, tempfile.TemporaryFile() as changed:
        first_url, number = "", 0
        for number, raw in enumerate(file, start=1):
            if number > 1 and model is None:
                break
            try:
                line = json.loads(raw) if raw.strip() else {}
            except ValueError as error:
                raise BadRequest(f"{path}, line {number}: not valid JSON: {error}") from error
            if not isinstance(line, dict):
                raise BadRequest(f"{path}, line {number}: not a JSON object")
            if number == 1 and isinstance(line.get("url"), str):
                first_url = line["url"]
            if model is not None and line:
                if isinstance(line.get("body"), dict):
                    line["body"].setdefault("model", model)
                changed.write(json.dumps(line).encode() + b"\n")
        if not number:
            raise BadRequest(f"{path} is empty: give a file with a call on each line")
        chosen = file if model is None else changed
        chosen.seek(0)
        yield chosen, first_url
