"""Dashboards, rules and alerts on a loaded fleet: every query finds data, in Prometheus itself where it is installed.

Debian's package `prometheus` has both programs; PROMETHEUS may name a folder with them instead.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from helpers.factories import make_adapter, make_tiny_model
from helpers.fleets import completion
from helpers.preloaded import fork
from helpers.scripts import script
from helpers.waiting import wait_until
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from chaos.fleet import ProcessFleet, Shape, free_port
from gateway.books.prometheus import RANGES_S, PrometheusCharts
from gateway.http.http_client import HttpClient
from protocol.metrics.series import DECLARED

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
ADAPTERS = ("first", "second", "third")
WINDOW = "20s"
NAME = re.compile(r"\b(?:lorafleet_|lorax_|vllm:)[a-z0-9_]+")


def program(name: str) -> str:
    found = shutil.which(name, path=os.environ.get("PROMETHEUS")) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: apt-get install prometheus")
    return found


def panels() -> dict[str, str]:
    """Return the queries of all dashboards by dashboard, panel and legend."""
    return {
        f"{path.stem}: {panel['title']}: {target['legendFormat']}": target["expr"]
        for path in sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
        for panel in json.loads(path.read_text())["panels"]
        for target in panel["targets"]
    }


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def base_names(queries: list[str]) -> set[str]:
    """Return the declared names of the series in queries."""
    found = {name for query in queries for name in NAME.findall(query)}
    return {re.sub(r"_(bucket|sum|count)$", "", name) if name not in DECLARED else name for name in found}


@asynccontextmanager
async def loaded(folder: Path) -> AsyncIterator[ProcessFleet]:
    """Run a fleet with constant requests to its base and three adapters, one of which is evicted each time."""
    model = make_tiny_model(folder / "model")
    for seed, name in enumerate(ADAPTERS, start=1):
        make_adapter(folder / "adapters" / name, model, seed=seed)
    fleet = ProcessFleet.prepare(folder, model, folder / "adapters", durable=False, spawn=fork, vllm_metrics=True)
    for service in ("scheduler", "store"):
        fleet.add(service, metrics_port=free_port())
    await fleet.bus._redis.config_set("maxmemory", 1 << 30)

    async def ask() -> None:
        async with httpx2.AsyncClient(base_url=fleet.url, timeout=60, trust_env=False) as http:
            while True:
                for name in (*ADAPTERS, *ADAPTERS[:2], "base"):
                    answer = await http.post("/v1/completions", json=completion(name, "the dog"))
                    assert answer.status_code == 200, answer.text
                    if name == ADAPTERS[-1]:
                        await http.post(f"/v1/adapters/{name}/evict")

    try:
        await fleet.start_all(Shape())
        asking = asyncio.create_task(ask())
        yield fleet
        asking.cancel()
        await asyncio.wait([asking])
    finally:
        await fleet.close()


def pages_of(fleet: ProcessFleet) -> dict[str, str]:
    """Return the addresses of all metrics endpoints by service."""
    ports = {name: member.settings.metrics_port for name, member in fleet.members.items()}
    ports["gateway"] = fleet.members["gateway"].settings.port
    return {name: f"127.0.0.1:{port}" for name, port in ports.items() if port}


def test_dashboards_are_what_the_description_makes() -> None:
    for path, text in script("deploy/grafana/build.py").files().items():
        assert path.read_text() == text, "python deploy/grafana/build.py"


def test_dashboards_and_rules_name_series_and_pages_that_exist() -> None:
    queries = [*panels().values(), *(rule["expr"] for rule in rules())]
    assert base_names(queries) <= DECLARED.keys()
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    assert {name for query in queries for name in re.findall(r"\blorafleet:\w+(?::\w+)?", query)} <= recorded
    alerts = [rule for rule in rules() if "alert" in rule]
    assert {ROOT / rule["annotations"]["runbook"] for rule in alerts} == set((ROOT / "docs" / "runbooks").glob("*.md"))
    for rule in alerts:
        assert (ROOT / rule["annotations"]["runbook"]).read_text().startswith(f"# {rule['alert']}\n")


async def test_a_loaded_fleet_shows_every_series_of_the_dashboards(tmp_path: Path) -> None:
    wanted = base_names([*panels().values(), *(rule["expr"] for rule in rules())])
    wanted.remove(OF_BASES)
    wanted -= {"lorafleet_tenant_refused_total", "lorafleet_requeued_requests_total", "lorafleet_http_dropped_total"}
    async with loaded(tmp_path) as fleet:

        async def missing() -> set[str]:
            shown: set[str] = set()
            for page in pages_of(fleet).values():
                text = (await fleet.http.get(f"http://{page}/metrics", headers=OPENMETRICS)).text
                shown |= {
                    family.name + "_total" * (family.type == "counter")
                    for family in text_string_to_metric_families(text)
                    if family.samples
                }
            return wanted - shown

        found: set[str] = set()

        async def all_there() -> bool:
            nonlocal found
            found = await missing()
            return not found

        await wait_until(all_there, lambda: f"these are shown: {sorted(found)}", every_s=0.3)


OF_BASES = "lorafleet_base_load"
"""A series that fleets with one base do not have: see tests/gateway/test_bases.py."""

OPENMETRICS = {"accept": "application/openmetrics-text"}


async def test_prometheus_finds_data_for_every_panel_and_rule(tmp_path: Path) -> None:
    prometheus = program("prometheus")
    short = re.compile(r"\[(?:\$__rate_interval|5m|15m)\]")
    (tmp_path / "rules.yml").write_text(short.sub(f"[{WINDOW}]", RULES.read_text()))
    port = free_port()
    async with loaded(tmp_path) as fleet:
        jobs = [{"job_name": name, "static_configs": [{"targets": [at]}]} for name, at in pages_of(fleet).items()]
        config = {
            "global": {"scrape_interval": "300ms", "scrape_timeout": "300ms", "evaluation_interval": "500ms"},
            "rule_files": ["rules.yml"], "scrape_configs": jobs,
        }  # fmt: skip
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
        queries = {name: short.sub(f"[{WINDOW}]", expr) for name, expr in panels().items() if OF_BASES not in expr}
        known = [rule for rule in rules() if OF_BASES not in rule["expr"]]
        for rule in known:  # for an alert, the compared expression, which has data even if the alert does not fire
            expr = short.sub(f"[{WINDOW}]", rule["expr"])
            queries[rule.get("alert") or rule["record"]] = re.sub(r"\s*(==|>|<)\s*[\d.]+\s*$", "", expr)
        with (tmp_path / "prometheus.log").open("wb") as log:
            process = subprocess.Popen(  # noqa: ASYNC220  it returns at once
                [prometheus, f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'tsdb'}",
                 f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn", "--enable-feature=exemplar-storage"],
                stdout=log, stderr=log,
            )  # fmt: skip
        try:
            wrong = dict.fromkeys(queries, "not asked yet")

            async def none_wrong() -> bool:
                nonlocal wrong
                assert process.poll() is None, (tmp_path / "prometheus.log").read_text()
                wrong = {name: why for name in wrong if (why := await _wrong(fleet.http, port, queries[name]))}
                return not wrong

            await wait_until(none_wrong, lambda: f"all have data: {wrong}", every_s=0.5)
            answer = (await fleet.http.get(f"http://127.0.0.1:{port}/api/v1/rules")).json()
            health = {rule["name"]: rule["health"] for group in answer["data"]["groups"] for rule in group["rules"]}
            assert set(health.values()) == {"ok"}, health
            has_data = partial(_charts_have_data, f"http://127.0.0.1:{port}")
            await wait_until(has_data, "all charts have data", every_s=0.5)
        finally:
            process.kill()
            process.wait()


async def _charts_have_data(url: str) -> bool:
    """Return whether a gateway's charts have values from Prometheus, for every range and group."""
    http = HttpClient()
    charts = PrometheusCharts(url, 'job="gateway"', http)
    try:
        for span in RANGES_S:
            models = await charts.read(span, "model")
            tenants = await charts.read(span, "tenant")
            assert isinstance(models, dict), models
            assert isinstance(tenants, dict), tenants
            all_, *named = models["groups"]
            columns = [all_[field] for field in ("requests", "hits", "misses", "ttft_p95_ms")]
            columns += [models["fleet"][field] for field in ("running", "workers", "output_tokens", "computed_tokens")]
            columns += [one[field] for one in named for field in ("requests", "output_tokens", "ttft_p50_ms")]
            columns += [one["requests"] for one in tenants["groups"]]
            if not all(map(any, columns)) or (len(named), len(tenants["groups"])) != (len(ADAPTERS) + 1, 2):
                return False
    finally:
        await http.close()
    return True


async def _wrong(http: httpx2.AsyncClient, port: int, query: str) -> str:
    """Return the fault of a query's answer, "" if it has values."""
    try:
        response = await http.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": query})
    except httpx2.TransportError as error:
        return repr(error)
    if response.status_code == 503:
        return "Prometheus is starting"
    answer = response.json()
    if answer["status"] != "success":
        raise AssertionError(f"{query}: {answer['error']}")
    values = [float(sample["value"][1]) for sample in answer["data"]["result"]]
    if not values:
        return f"empty: {query}"
    # Quantiles of names without recent requests are NaN; one number is enough.
    return "" if any(value == value for value in values) else f"not a number: {query}"


def test_promtool_takes_the_rules_and_their_tests_pass() -> None:
    promtool = program("promtool")
    for command in (["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"]):
        done = subprocess.run([promtool, *command], cwd=RULES.parent, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
