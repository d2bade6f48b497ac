"""The Helm chart, rendered by Helm's own engine: valid for the API server, and true to its values.

`make chart` runs these in an environment that has the engine and the API's schemas; elsewhere they are skipped.
"""

from __future__ import annotations

import base64
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.scripts import script

from protocol.queue.users import acl, table
from protocol.runtime.settings import Settings

REPO = Path(__file__).parents[2]
CHART = REPO / "deploy" / "helm" / "lorafleet"
FILES = sorted((CHART / "ci").glob("*-values.yaml"))
VERSIONS = ("1.27", "1.33")
FOREIGN = {"keda.sh/v1alpha1", "monitoring.coreos.com/v1", "gateway.networking.k8s.io/v1"}
"""API groups of other projects, for which no schemas are available here."""

Values = dict[str, Any]
Manifest = dict[str, Any]

helm: Any = pytest.importorskip("helm_python", reason="the Helm engine is not here: run `make chart`")
kubernetes_validate: Any = pytest.importorskip("kubernetes_validate")


@pytest.fixture(scope="module")
def chart() -> Any:
    return helm.Chart.load(str(CHART))


def values_of(name: str) -> Values:
    return yaml.safe_load((CHART / "ci" / f"{name}-values.yaml").read_text()) or {}


def render(chart: Any, values: Values, name: str = "lf") -> list[Manifest]:
    """Return the objects of a release in the namespace ml. Raises Helm's error for values that it refuses."""
    chart.validate_schema(values)
    texts = chart.render(values, name=name, namespace="ml", revision=1, is_install=True)
    return [
        manifest
        for path, text in texts.items() if path.endswith(".yaml")
        for manifest in yaml.safe_load_all(text) if manifest
    ]  # fmt: skip


def find(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    """Return the only object of a kind whose name has this ending."""
    (found,) = (m for m in manifests if m["kind"] == kind and m["metadata"]["name"].endswith(name))
    return found


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Return pod templates by the names of the objects that create the pods."""
    return {m["metadata"]["name"]: m["spec"]["template"] for m in manifests if "template" in m.get("spec", {})}


def container(pod: Manifest) -> Manifest:
    (only,) = pod["spec"]["containers"]
    return only


def environment(pod: Manifest) -> dict[str, str]:
    return {item["name"]: item.get("value", "") for item in container(pod).get("env", ())}


def selects(selector: dict[str, Any], pod: Manifest) -> bool:
    return selector["matchLabels"].items() <= pod["metadata"]["labels"].items()


# ------------------------------------------------------------ valid for Helm and the API server


def test_there_are_ten_files_of_values() -> None:
    assert len(FILES) >= 10


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_of_values_lints_and_fits_the_api(chart: Any, file: Path) -> None:
    values = yaml.safe_load(file.read_text()) or {}
    report = helm.lint(str(CHART), values, strict=True, namespace="ml")
    assert [m for m in report["messages"] if m["severity"] > 1] == []
    manifests = render(chart, values)
    names = [(m["kind"], m["metadata"]["name"]) for m in manifests]
    assert len(names) == len(set(names))
    checked = 0
    for manifest, version in product(manifests, VERSIONS):
        if manifest["apiVersion"] not in FOREIGN:
            kubernetes_validate.validate(manifest, version, strict=True)
            checked += 1
    assert checked >= 20


def test_the_api_s_schemas_find_mistakes(chart: Any) -> None:
    service = find(render(chart, {}), "Service", "lf-lorafleet")
    service["spec"]["ports"][0]["targetport"] = "http"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(service, VERSIONS[0], strict=True)


@pytest.mark.parametrize(
    "values",
    [
        {"gateway": {"replica": 2}},
        {"gateway": {"settings": {"max_queue": 1}}},
        {"workers": {"cpu": {"gpus": 2}}},
        {"workers": {"Bad_Name": {}}},
        {"queue": {"memory": "2GB"}},
        {"adapters": [{"name": "a"}]},
        {"model": {"more": ["a,b"]}},
    ],
    ids=lambda values: json.dumps(values),
)
def test_what_is_misspelt_is_refused(chart: Any, values: Values) -> None:
    with pytest.raises(helm.HelmValuesError):
        render(chart, values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"queue": {"enabled": False, "external": {"host": "h"}}}, "secrets.queueUsers"),
        ({"queue": {"enabled": False}, "secrets": {"queueUsers": "u"}}, "queue.external.host"),
        ({"adapters": [{"name": "a", "source": "o/a"}]}, "keySecret"),
        ({"workers": {"cpu": {"autoscaling": {"enabled": True}}}}, "keySecret"),
        ({"metrics": {"monitors": True}}, "keySecret"),
        ({"gateway": {"files": {"claim": "c", "s3": "s3://b"}}}, "not both"),
        ({"gateway": {"ingress": {"enabled": True}}}, "gateway.ingress.host"),
        ({"workers": {"cpu": {"model": "org/other"}}}, "org/other is neither"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_what_does_not_fit_together_is_refused(chart: Any, values: Values, words: str) -> None:
    with pytest.raises(helm.HelmError, match=words):
        render(chart, values)


def test_a_long_name_stays_a_name(chart: Any) -> None:
    manifests = render(chart, values_of("adapters"), name="a-release-with-a-name-of-fifty-three-characters-in-it")
    assert max(len(m["metadata"]["name"]) for m in manifests) <= 63


# ------------------------------------------------------------ facts defined in the code


def test_the_chart_has_the_rights_and_settings_of_this_version() -> None:
    made = script(".ci/chart.py")
    assert made.ACL.read_text() == made.acl_file(), "run python .ci/chart.py"
    assert made.SCHEMA.read_text() == made.schema(), "run python .ci/chart.py"
    copies, boards = ({file.name: file.read_text() for file in at.iterdir()} for at in (made.COPIES, made.DASHBOARDS))
    assert copies == boards, "run python .ci/chart.py"


def test_gateways_write_keys_if_operators_may_over_http(chart: Any) -> None:
    manifests = render(chart, {"settings": {"console_keys": True}})
    data = {name: base64.b64decode(text).decode() for name, text in find(manifests, "Secret", "users")["data"].items()}
    granted = set(data.pop("users.acl").splitlines()[2].split())
    assert granted == set(acl(data, console_keys=True).splitlines()[2].split())


def test_the_queue_gets_the_users_and_each_service_its_own_password(chart: Any) -> None:
    manifests = render(chart, {})
    data = {name: base64.b64decode(text).decode() for name, text in find(manifests, "Secret", "users")["data"].items()}
    assert data.pop("users.acl") == acl(data)
    assert data.keys() == table().keys()
    assert len(set(data.values())) == len(data)
    assert min(map(len, data.values())) >= 43
    users = {"cli": "operator", "gateway": "gateway", "scheduler": "scheduler", "store": "store", "cpu": "worker"}
    for name, pod in pods(manifests).items():
        component = name.rpartition("-")[2]
        held = [
            v["secret"] for v in pod["spec"]["volumes"] if v.get("secret", {}).get("secretName", "").endswith("users")
        ]
        assert [[item["key"] for item in secret["items"]] for secret in held] == [[users.get(component, "users.acl")]]
        if component in users:
            assert environment(pod)["REDIS_URL"] == f"redis://{users[component]}@lf-lorafleet-queue:6379/0"


def test_only_those_who_need_the_fleet_s_secret_get_it(chart: Any) -> None:
    holders = {
        name.rpartition("-")[2]
        for name, pod in pods(render(chart, {})).items() for volume in pod["spec"]["volumes"]
        if volume.get("secret", {}).get("secretName") == "lf-lorafleet-fleet"
    }  # fmt: skip
    assert holders == {"gateway", "store", "cpu"}


def test_no_secret_is_made_where_one_is_named(chart: Any) -> None:
    assert [m for m in render(chart, values_of("external-queue")) if m["kind"] == "Secret"] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_variable_is_a_setting(chart: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The services read what the chart writes: integers are written as integers, and every name is a setting."""
    for pod in pods(render(chart, yaml.safe_load(file.read_text()) or {})).values():
        given = {
            k.removeprefix("LORAFLEET_").lower(): v for k, v in environment(pod).items() if k.startswith("LORAFLEET_")
        }
        assert given.keys() <= Settings.model_fields.keys()
        for name, value in given.items():
            monkeypatch.setenv(f"LORAFLEET_{name.upper()}", value)
        read = Settings().model_dump(mode="json")
        assert {name: str(read[name]).lower() for name in given if not isinstance(read[name], float)} == {
            name: value.lower() for name, value in given.items() if not isinstance(read[name], float)
        }
        for name in given:
            monkeypatch.delenv(f"LORAFLEET_{name.upper()}")


# ------------------------------------------------------------ promises


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_pod_has_more_rights_than_it_needs(chart: Any, file: Path) -> None:
    for pod in pods(render(chart, yaml.safe_load(file.read_text()) or {})).values():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        rights = container(pod)["securityContext"]
        assert rights["readOnlyRootFilesystem"] is True
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert container(pod)["resources"]["limits"]["memory"]
        assert all("hostPath" not in volume for volume in spec["volumes"])


def test_a_pod_has_time_to_drain(chart: Any) -> None:
    for values in ({}, {"graceSeconds": 300}):
        for name, pod in pods(render(chart, values)).items():
            component = name.rpartition("-")[2]
            if component not in ("queue", "cli"):
                grace_s = float(environment(pod)["LORAFLEET_GRACE_S"])
                before = (
                    container(pod).get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["", "0"])
                )
                assert pod["spec"]["terminationGracePeriodSeconds"] >= grace_s + float(before[1]) + 5
    gateway = pods(render(chart, {}))["lf-lorafleet-gateway"]
    assert container(gateway)["lifecycle"]["preStop"]["exec"]["command"][0] == "sleep"


def test_a_worker_has_time_to_load_its_model(chart: Any) -> None:
    values = {"workers": {"cpu": {"startSeconds": 3600}}}
    probe = container(pods(render(chart, values))["lf-lorafleet-worker-cpu"])["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 3600


def test_disruptions_take_one_of_several(chart: Any) -> None:
    manifests = render(chart, values_of("s3"))
    budgets = [m["spec"] for m in manifests if m["kind"] == "PodDisruptionBudget"]
    assert [budget["maxUnavailable"] for budget in budgets] == [1] * len(budgets)
    covered = {name for name, pod in pods(manifests).items() for b in budgets if selects(b["selector"], pod)}
    assert covered == {f"lf-lorafleet-{name}" for name in ("gateway", "scheduler", "store", "worker-cpu")}
    # A budget that never lets the only pod go would block the draining of its node.
    alone = render(chart, values_of("open"))
    assert not [m for m in alone if m["kind"] == "PodDisruptionBudget" and "gateway" in m["metadata"]["name"]]


def test_every_selector_finds_its_pods_and_no_others(chart: Any) -> None:
    manifests = render(chart, values_of("gpu"))
    templates = pods(manifests)
    for manifest in manifests:
        if manifest["kind"] in ("Deployment", "StatefulSet"):
            found = {name for name, pod in templates.items() if selects(manifest["spec"]["selector"], pod)}
            assert found == {manifest["metadata"]["name"]}
        elif manifest["kind"] == "Service":
            found = {
                name for name, pod in templates.items() if selects({"matchLabels": manifest["spec"]["selector"]}, pod)
            }
            name = manifest["metadata"]["name"]
            assert found == {"lf-lorafleet-gateway" if name == "lf-lorafleet" else name}
    affinities = [pod["spec"]["affinity"]["podAntiAffinity"] for pod in templates.values()]
    assert len(affinities) == len(templates)


def test_groups_of_workers_have_their_own_devices(chart: Any) -> None:
    templates = pods(render(chart, values_of("gpu")))
    assert {name for name in templates if "worker" in name} == {"lf-lorafleet-worker-a100", "lf-lorafleet-worker-l4"}
    big, small = templates["lf-lorafleet-worker-a100"], templates["lf-lorafleet-worker-l4"]
    for pod in (big, small):
        assert container(pod)["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert environment(pod)["LORAFLEET_DEVICE"] == "cuda"
    assert big["spec"]["nodeSelector"] == {"accelerator": "a100"}
    assert big["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert environment(small)["LORAFLEET_GPU_MEMORY_UTILIZATION"] == "0.85"
    cpu = pods(render(chart, {}))["lf-lorafleet-worker-cpu"]
    assert "nvidia.com/gpu" not in container(cpu)["resources"]["limits"]
    assert environment(cpu)["LORAFLEET_DEVICE"] == "cpu"


def edges(manifests: list[Manifest]) -> set[tuple[str, str, int]]:
    """Return (from, to, port) of the connections between pods that the policies of both ends allow."""
    templates = pods(manifests)
    policies = [m["spec"] for m in manifests if m["kind"] == "NetworkPolicy"]

    def allows(pod: Manifest, other: Manifest, port: int, direction: str, peers: str) -> bool:
        mine = [p for p in policies if selects(p["podSelector"], pod)]
        rules = [rule for policy in mine for rule in policy[direction]]
        return not mine or any(
            port in [item["port"] for item in rule["ports"]]
            and (peers not in rule or any(selects(p["podSelector"], other) for p in rule[peers] if "podSelector" in p))
            for rule in rules
        )

    found: set[tuple[str, str, int]] = set()
    for (a, one), (b, two) in product(templates.items(), repeat=2):
        for port in [item["containerPort"] for item in container(two).get("ports", ())]:
            if a != b and allows(one, two, port, "egress", "to") and allows(two, one, port, "ingress", "from"):
                found.add((a.removeprefix("lf-lorafleet-"), b.removeprefix("lf-lorafleet-"), port))
    return found


def test_only_the_edges_of_the_architecture_are_open(chart: Any) -> None:
    queue = {(name, "queue", 6379) for name in ("gateway", "scheduler", "store", "worker-cpu", "cli")}
    store = {(name, "store", 9000) for name in ("gateway", "worker-cpu")}
    assert edges(render(chart, {})) == queue | store
    with_job = edges(render(chart, values_of("adapters")))
    assert with_job == {edge for edge in queue | store if edge[0] != "cli"} | {("adapters-1", "gateway", 8000)}


def test_what_lies_outside_is_reached_by_those_who_fetch(chart: Any) -> None:
    def reach(values: Values) -> set[str]:
        policies = [m for m in render(chart, values) if m["kind"] == "NetworkPolicy"]
        return {
            policy["metadata"]["name"].removeprefix("lf-lorafleet-")
            for policy in policies
            for rule in policy["spec"]["egress"]
            for peer in rule.get("to", ()) if "169.254.169.254/32" in peer.get("ipBlock", {}).get("except", ())
        }  # fmt: skip

    assert reach({}) == {"gateway", "store", "worker"}
    assert reach({"model": {"claim": "models", "name": "/models/m"}}) == {"gateway", "store"}


def test_gateways_without_keys_answer_to_their_own_names_only(chart: Any) -> None:
    own = environment(pods(render(chart, values_of("open")))["lf-lorafleet-gateway"])
    assert own["LORAFLEET_API_KEYS"] == "false"
    inside = {f"lf-lorafleet{rest}" for rest in ("", ".ml", ".ml.svc", ".ml.svc.cluster.local")}
    assert set(own["LORAFLEET_ALLOWED_HOSTS"].split(",")) == inside | {"llm.example.com"}
    assert environment(pods(render(chart, {}))["lf-lorafleet-gateway"])["LORAFLEET_API_KEYS"] == "true"


def test_workers_are_scaled_by_requests_and_from_none(chart: Any) -> None:
    manifests = render(chart, values_of("zero"))
    scaled = find(manifests, "ScaledObject", "worker-cpu")["spec"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"], scaled["cooldownPeriod"]) == (0, 4, 600)
    (trigger,) = scaled["triggers"]
    assert trigger["type"] == "metrics-api"
    assert trigger["metadata"]["url"] == "http://lf-lorafleet.ml.svc:80/v1/fleet"
    assert (trigger["metadata"]["valueLocation"], trigger["metadata"]["targetValue"]) == ("demand", "16")
    assert find(manifests, "TriggerAuthentication", "")["spec"]["secretTargetRef"][0]["name"] == "admin-key"
    assert "replicas" not in find(manifests, "Deployment", "worker-cpu")["spec"]
    # Without a worker, a gateway that is ready only with one would get no calls, so nothing would scale up.
    gateway = container(pods(manifests)["lf-lorafleet-gateway"])
    assert "tcpSocket" in gateway["readinessProbe"]
    assert "httpGet" in container(pods(render(chart, {}))["lf-lorafleet-gateway"])["readinessProbe"]
    for name in ("lf-lorafleet-gateway", "lf-lorafleet-scheduler"):
        assert environment(pods(manifests)[name])["LORAFLEET_WAIT_FOR_WORKER_S"] == "600"


def test_each_base_has_its_own_workers_which_its_own_demand_starts(chart: Any) -> None:
    manifests = render(chart, values_of("bases"))
    templates = pods(manifests)
    models = {"chat": "org/chat-8b", "classify": "org/classifier-1b", "embed": "/models/embedder.v2"}
    for name, pod in templates.items():
        own = environment(pod)
        group = name.removeprefix("lf-lorafleet-worker-")
        if group in models:
            assert own["LORAFLEET_MODEL"] == models[group]
            assert own["LORAFLEET_MORE_MODELS"].split(",") == [one for one in models.values() if one != models[group]]
            assert own["LORAFLEET_SERVED_NAME"] == ("chat" if group == "chat" else "")
        elif "LORAFLEET_MODEL" in own and "queue" not in name:
            assert (own["LORAFLEET_MODEL"], own["LORAFLEET_SERVED_NAME"]) == ("org/chat-8b", "chat")
            assert own["LORAFLEET_MORE_MODELS"] == "org/classifier-1b,/models/embedder.v2"
    mounts = container(templates["lf-lorafleet-store"])["volumeMounts"]
    assert "/models" in [mount["mountPath"] for mount in mounts], "a base has the name of its folder"
    mounts = container(pods(render(chart, values_of("folders")))["lf-lorafleet-store"])["volumeMounts"]
    assert "/models" not in [mount["mountPath"] for mount in mounts], "which a store of one base need not know"
    scaled = [m for m in manifests if m["kind"] == "ScaledObject"]
    assert {m["metadata"]["name"].rpartition("-")[2]: m["spec"]["minReplicaCount"] for m in scaled} == {
        "classify": 0, "embed": 1,
    }  # fmt: skip
    asked = {m["spec"]["triggers"][0]["metadata"]["valueLocation"] for m in scaled}
    assert asked == {f'bases.#(name=="{name}").demand' for name in ("org/classifier-1b", "embedder.v2")}
    values = values_of("bases")
    values["workers"]["classify"]["autoscaling"]["prometheus"] = "http://prometheus:9090"
    (trigger,) = find(render(chart, values), "ScaledObject", "classify")["spec"]["triggers"]
    wanted = 'max(lorafleet_base_load{namespace="ml",base="org/classifier-1b",what="demand"})'
    assert trigger["metadata"]["query"] == wanted


def test_the_notes_name_a_base_without_workers(chart: Any) -> None:
    def notes(values: Values) -> str:
        texts = chart.render(values, name="lf", namespace="ml", revision=1, is_install=True)
        return next(text for path, text in texts.items() if path.endswith("NOTES.txt"))

    assert "no group" not in notes(values_of("bases"))
    assert "no group of workers has the model org/x" in notes({"model": {"name": "org/a", "more": ["org/x"]}})


def test_a_queue_behind_sentinels_is_found_by_them(chart: Any) -> None:
    manifests = render(chart, values_of("sentinels"))
    hosts = ",".join(f"sentinel-{i}.example.com:26379" for i in range(3))
    worker = pods(manifests)["lf-lorafleet-worker-cpu"]
    assert environment(worker)["REDIS_URL"] == f"redis-sentinel://worker@{hosts}/fleet/0"
    assert environment(worker)["LORAFLEET_REDIS_SENTINEL_PASSWORD_FILE"] == "/sentinel/password"
    egress = find(manifests, "NetworkPolicy", "scheduler")["spec"]["egress"]
    assert {port["port"] for rule in egress for port in rule["ports"]} == {53, 6379, 26379}


def test_prometheus_scales_and_scrapes(chart: Any) -> None:
    manifests = render(chart, values_of("prometheus"))
    trigger, cron = find(manifests, "ScaledObject", "worker-cpu")["spec"]["triggers"]
    assert cron["type"] == "cron"
    assert "lorafleet_queued_requests" in trigger["metadata"]["query"]
    assert not [m for m in manifests if m["kind"] == "TriggerAuthentication"]
    monitor = find(manifests, "ServiceMonitor", "lorafleet")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    gateway_service = find(manifests, "Service", "lf-lorafleet")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= gateway_service["metadata"]["labels"].items()
    ports = {
        name for name, pod in pods(manifests).items() for p in container(pod).get("ports", ()) if p["name"] == "metrics"
    }
    assert ports == {f"lf-lorafleet-{name}" for name in ("scheduler", "store", "worker-cpu")}


def test_grafana_finds_every_dashboard_with_its_own_data_source(chart: Any) -> None:
    assert not [one for one in render(chart, {}) if "dashboard" in one["metadata"]["name"]]
    manifests = render(chart, values_of("prometheus"))
    found = [one for one in manifests if one["metadata"]["labels"].get("grafana_dashboard") == "1"]
    boards = {name: json.loads(text) for one in found for name, text in one["data"].items()}
    assert boards.keys() == {file.name for file in script(".ci/chart.py").DASHBOARDS.iterdir()}
    for name, board in boards.items():
        assert board["title"]
        assert '"uid": "prometheus"' not in json.dumps(board), name
    assert {one["metadata"]["annotations"]["grafana_folder"] for one in found} == {"Lorafleet"}
    default = render(chart, {"metrics": {"dashboards": {"enabled": True}}})
    assert '"uid": "prometheus"' in find(default, "ConfigMap", "dashboard-overview")["data"]["overview.json"]


def test_a_worker_has_the_name_of_its_pod(chart: Any) -> None:
    (worker,) = (pod for name, pod in pods(render(chart, {})).items() if "worker" in name)
    names = {one["name"]: one.get("valueFrom") for one in container(worker)["env"]}
    assert names["LORAFLEET_WORKER_NAME"] == {"fieldRef": {"fieldPath": "metadata.name"}}


def test_the_queue_is_full_before_its_container_is(chart: Any) -> None:
    queue = find(render(chart, {"queue": {"memory": "4Gi"}}), "StatefulSet", "queue")
    (only,) = queue["spec"]["template"]["spec"]["containers"]
    assert f"--maxmemory {3 << 30} " in only["command"][2]
    assert only["resources"]["limits"]["memory"] == "4Gi"
