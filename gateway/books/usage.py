"""Usage in the format of OpenAI's `/v1/organization/usage/completions`: one bucket per day. Pure.

A tenant is OpenAI's project.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from protocol.queue.books.usage import DAY_S, OTHERS, UsageRow
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest

GROUPS = ("project_id", "model", "batch", "adapter", "base_model")
"""Fields to group usage by. The last two are not OpenAI's: an adapter's digest, and the base model."""

NOT_COUNTED = ("user_id", "api_key_id", "service_tier", "api_source")
"""Fields by which OpenAI can group, but this fleet does not count."""

MAX_RESULTS = 20_000
"""Maximum results of an answer, over all its days."""

_COUNTS = ("num_model_requests", "input_tokens", "input_cached_tokens", "output_tokens")
_COLUMNS = ("date", "start_time", "end_time", *GROUPS, *_COUNTS, "adapter_seconds")


@dataclass(frozen=True, slots=True)
class Query:
    """A parsed query."""

    first_day: int  # days since 1970, UTC
    end_day: int  # exclusive
    limit: int  # maximum days in an answer
    group_by: Sequence[str] = ()
    models: frozenset[str] = frozenset()  # empty: all
    projects: frozenset[str] = frozenset()  # empty: all that the caller may see
    batch: bool | None = None  # None: both

    @property
    def days(self) -> range:
        """The days of this page."""
        return range(self.first_day, min(self.first_day + self.limit, self.end_day))

    @property
    def shows_residency(self) -> bool:
        """Whether adapters' residency can be reported: it belongs to no single tenant."""
        return self.group_by in ((), ("adapter",)) and not self.models and not self.projects and self.batch is None

    def takes(self, row: UsageRow) -> bool:
        """Return whether a row matches the query."""
        return (not self.models or shown_model(row) in self.models) and self.batch in (None, row.batch)


@dataclass(slots=True)
class Day:
    """The sums of a day per group."""

    day: int
    sums: dict[tuple[Any, ...], list[int]] = field(default_factory=dict[tuple[Any, ...], list[int]])
    seconds: Mapping[str, float] | None = None  # residency by digest; None: not reported

    def add(self, rows: Iterable[UsageRow], query: Query) -> None:
        """Add rows of this day."""
        for row in rows:
            if query.takes(row):
                values = {
                    "project_id": row.tenant,
                    "model": shown_model(row),
                    "batch": row.batch,
                    "adapter": row.digest,
                    "base_model": row.base,
                }
                group = tuple(values[name] for name in query.group_by)
                counts = (row.requests, row.prompt_tokens, row.cached_tokens, row.output_tokens)
                before = self.sums.get(group, (0, 0, 0, 0))
                self.sums[group] = [a + b for a, b in zip(before, counts, strict=True)]

    def bucket(self, query: Query) -> dict[str, Any]:
        """Return the day as an object."""
        groups = dict(self.sums)
        if self.seconds and query.group_by:
            groups = {(digest,): [0, 0, 0, 0] for digest in self.seconds} | groups
        results = [self._result(group, counts, query) for group, counts in sorted(groups.items())]
        start_s = self.day * DAY_S
        return {"object": "bucket", "start_time": start_s, "end_time": start_s + DAY_S, "results": results}

    def _result(self, group: tuple[Any, ...], counts: Sequence[int], query: Query) -> dict[str, Any]:
        by = dict(zip(query.group_by, group, strict=True))
        seconds = None
        if self.seconds is not None:
            seconds = self.seconds.get(by["adapter"], 0.0) if by else sum(self.seconds.values())
        return {
            "object": "organization.usage.completions.result",
            **dict(zip(_COUNTS, counts, strict=True)),
            **{name: by.get(name) for name in (*GROUPS, *NOT_COUNTED)},
            "adapter_seconds": None if seconds is None else round(seconds, 3),
        }


def shown_model(row: UsageRow) -> str:
    """Return a row's model as shown in an answer."""
    return row.model or OTHERS


def page(days: Sequence[Day], query: Query) -> dict[str, Any]:
    """Return days as a page in OpenAI's format. Raises BadRequest for too many results."""
    num = sum(len(day.sums) for day in days)
    check_number(num)
    has_more = query.days.stop < query.end_day
    return {
        "object": "page",
        "data": [day.bucket(query) for day in days],
        "has_more": has_more,
        "next_page": page_name(query.days.stop) if has_more else None,
    }


def check_number(num: int) -> None:
    """Raise BadRequest for more results than an answer may have."""
    if num > MAX_RESULTS:
        text = f"the answer would exceed {MAX_RESULTS} results: ask for fewer days, projects or groups"
        raise BadRequest(text, param="limit", code="limit_exceeded")


def csv_text(answer: Mapping[str, Any]) -> str:
    """Return a page as CSV, one line per result."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore")
    writer.writeheader()
    for bucket in answer["data"]:
        date = time.strftime("%Y-%m-%d", time.gmtime(bucket["start_time"]))
        for result in bucket["results"]:
            times = {"date": date, "start_time": bucket["start_time"], "end_time": bucket["end_time"]}
            writer.writerow(times | result)
    return text.getvalue()


def page_name(day: int) -> str:
    """Return the `page` parameter for a page that begins with a day."""
    return f"page_{day}"


def day_of_page(name: str) -> int:
    """Return the first day of a `page` parameter. Raises BadRequest."""
    number = name.removeprefix("page_")
    if not (name.startswith("page_") and number.isascii() and number.isdecimal() and len(number) < 8):
        raise BadRequest(f"{brief(name)} is not a page: use next_page of an earlier answer", param="page")
    return int(number)
