"""The compose file, without Docker: its defaults name existing files, and its variables reach the services."""

import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile.memory import SANDBOX_BYTES, Crowd, gateway_bytes

from lorafleet.quickstart import HUB_MODEL_ID
from protocol.queue.users import table
from protocol.runtime.model_files import worker_bases
from protocol.runtime.settings import Settings

ROOT = Path(__file__).parents[2]
SERVICES = ("gateway", "scheduler", "adapter_store", "gpu_worker")
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
COMPOSE = (ROOT / "compose.yaml").read_text()
READERS = ("gateway", "gpu_worker")
"""Services that read files of the base model."""
START_BYTES = 400 << 20
"""Memory of a gateway with its model's tokenizer, before its first call."""


def compose(file: str = COMPOSE, **variables: str) -> dict[str, Any]:
    """Return the services of a file as `docker compose` resolves them with these variables."""
    text = VARIABLE.sub(lambda match: variables.get(match[1]) or match[2] or "", file)
    return yaml.safe_load(text)["services"]


def networks(service: dict[str, Any]) -> set[str]:
    """Return the networks of a service."""
    return set(service.get("networks", ()))


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Return the mounts of a service: path in the container -> volume, or folder of the host."""
    return {volume.split(":")[1]: volume.split(":")[0] for volume in service["volumes"]}


def test_by_default_all_read_the_model_where_fetch_puts_it() -> None:
    services = compose()
    fetch = services["model"]
    assert fetch["entrypoint"][-2:] == ["lorafleet", "fetch"]
    assert fetch["environment"]["LORAFLEET_MODEL"] == ""  # makes `fetch` take the quickstart model
    data = Path(fetch["environment"]["LORAFLEET_DATA"])
    for name in READERS:
        assert services[name]["environment"]["LORAFLEET_MODEL"] == str(data / "models" / HUB_MODEL_ID.split("/")[1])
        assert mounts(services[name])[str(data)] == mounts(fetch)[str(data)]


@pytest.mark.parametrize("model", ["/models/mine", "org/name"])
def test_a_model_that_is_named_is_fetched_and_read_by_that_name(model: str) -> None:
    services = compose(MODEL=model, MODELS_DIR="/srv/models")
    for name in ("model", *READERS):
        assert services[name]["environment"]["LORAFLEET_MODEL"] == model
        assert mounts(services[name])["/models"] == "/srv/models"
    cache = "/home/lorafleet/.cache/huggingface"
    assert {mounts(services[name])[cache] for name in ("model", *READERS)} == {"hub"}


def test_several_models_reach_all_who_must_know_of_them_and_no_others() -> None:
    services = compose(MODELS="org/one,/models/two", MODELS_DIR="/srv/models")
    several = {name for name, service in services.items() if service.get("environment", {}).get("MODELS")}
    assert several == {"model", "gateway", "adapter_store", "gpu_worker", "cuda_worker"}
    for name in several:
        assert services[name]["entrypoint"][:2] == ["python", "/usr/local/bin/bases.py"]
        assert mounts(services[name])["/models"] == "/srv/models", "a base has the name of its folder"
    locks = {name for name in several if "BASE_LOCKS" in services[name]["environment"]}
    assert locks == {"gpu_worker", "cuda_worker"}
    for name in locks:
        assert mounts(services[name])[services[name]["environment"]["BASE_LOCKS"]] == "bases"
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    assert " /bases " in dockerfile, "whoever they run as may write locks"
    assert "deploy/bases.py /usr/local/bin/" in dockerfile


BASES = [sys.executable, str(ROOT / "deploy/bases.py"), "sh", "-c"]
"""The container's entrypoint, here with a shell command in place of a service."""


def test_each_worker_takes_the_base_that_the_fewest_have_taken(tmp_path: Path) -> None:
    """All workers know the same bases in the same order, so that a served name applies only to the default base."""
    own = {"PATH": os.environ["PATH"], "MODELS": " a, org/b,/srv/c ,a,", "BASE_LOCKS": str(tmp_path)}
    own["LORAFLEET_SERVED_NAME"] = "chat"
    command = [*BASES, 'echo "$LORAFLEET_BASE of $LORAFLEET_MODEL,$LORAFLEET_MORE_MODELS"; read -r end']
    with ExitStack() as stack:

        def worker() -> tuple[Any, str]:
            pipe = subprocess.PIPE
            process = stack.enter_context(subprocess.Popen(command, env=own, stdin=pipe, stdout=pipe, text=True))
            assert process.stdout is not None
            return process, process.stdout.readline().strip()

        workers = [worker() for _ in range(5)]
        names = ["chat", "org/b", "c", "chat", "org/b"]
        assert [took for _, took in workers] == [f"{name} of a,org/b,/srv/c" for name in names]
        settings = Settings(model="a", more_models="org/b,/srv/c", served_name="chat")
        assert set(names) == set(worker_bases(settings)), "as workers name them"
        workers[2][0].communicate("end\n")
        assert worker()[1] == "c of a,org/b,/srv/c", "what a worker had that has gone is free"


def test_services_of_one_model_are_started_as_they_are() -> None:
    def said(**own: str) -> str:
        command = [*BASES, 'echo "$LORAFLEET_MODEL+$LORAFLEET_MORE_MODELS"; exit 7']
        done = subprocess.run(command, env={"PATH": os.environ["PATH"], **own}, capture_output=True, text=True)
        assert done.returncode == 7
        return done.stdout.strip()

    assert said(LORAFLEET_MODEL="m", MODELS="") == "m+"
    assert said(LORAFLEET_MODEL="m", MODELS="a,b") == "a+b", "gateways and stores"


def test_only_one_service_fetches_and_the_others_wait_for_it() -> None:
    services = compose()
    for name in READERS:
        assert services[name]["depends_on"]["model"] == {"condition": "service_completed_successfully"}
        assert services[name]["environment"]["HF_HUB_OFFLINE"] == "1"
        writable = {volume.split(":")[0] for volume in services[name]["volumes"] if not volume.endswith(":ro")}
        assert writable == {"secret", "files" if name == "gateway" else "bases"}
    assert services["model"]["restart"] == "no"  # its error stays the last line of its log
    assert services["model"]["image"] == services["gpu_worker"]["image"]  # converting needs torch


def test_the_default_adapters_are_the_examples() -> None:
    folder = ROOT / mounts(compose()["adapter_store"])["/adapters"]
    assert folder == ROOT / "examples/adapters"
    assert sorted(config.parent.name for config in folder.glob("*/adapter_config.json")) == ["haiku", "json", "pirate"]
    assert mounts(compose(ADAPTERS_DIR="/srv/mine")["adapter_store"])["/adapters"] == "/srv/mine"


def test_every_variable_is_in_the_example_with_its_default() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    listed = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    used: dict[str, set[str]] = {}
    for match in VARIABLE.finditer(COMPOSE):
        used.setdefault(match[1], set()).add(match[2] or "")
    assert used.pop("MODEL") == {"", "/data/models/SmolLM2-135M-Instruct"}  # both mean the quickstart model
    assert listed.pop("MODEL") == ""
    assert listed.pop("COMPOSE_PROFILES") == ""  # compose reads it itself
    assert {name: {default} for name, default in listed.items()} == used


def test_services_are_given_settings_that_exist() -> None:
    known = {f"LORAFLEET_{name.upper()}" for name in Settings.model_fields}
    given = {name for service in compose().values() for name in service.get("environment", {})}
    assert {name for name in given if name.startswith("LORAFLEET_")} <= known


def test_on_gpus_as_many_workers_start_as_are_wanted_each_with_its_own() -> None:
    services = compose(GPU_COUNT="4", GPU_IDS="0,1,2,3", CPU_WORKERS="0")
    worker = services["cuda_worker"]
    assert worker["profiles"] == ["gpu"]
    assert services["gpu_worker"]["deploy"]["replicas"] == 0
    assert worker["deploy"]["replicas"] == 4
    [devices] = worker["deploy"]["resources"]["reservations"]["devices"]
    assert devices["count"] == "all", "each sees every GPU"
    assert worker["environment"]["LORAFLEET_GPUS"] == "0,1,2,3", "of which it takes one"
    assert worker["environment"]["LORAFLEET_GPU_LOCKS"] in mounts(worker), "by locks that all share"
    assert "/gpus" in (ROOT / "deploy/Dockerfile").read_text(), "and may write, whoever they run as"
    on_cpu = services["gpu_worker"]
    others = {"LORAFLEET_DEVICE", "LORAFLEET_GPUS", "LORAFLEET_GPU_LOCKS"}
    own, same = ({k: v for k, v in one["environment"].items() if k not in others} for one in (worker, on_cpu))
    assert own == same, "a worker on a GPU gets what one on the CPU gets"
    assert mounts(worker) == {**mounts(on_cpu), "/gpus": "gpus"}
    alone = compose()["cuda_worker"]
    assert (alone["deploy"]["replicas"], alone["environment"]["LORAFLEET_GPUS"]) == (1, 0)


def test_each_service_enters_the_queue_as_a_user_of_its_own() -> None:
    services = compose()
    users = {"adapter_store": "store", "gpu_worker": "worker", "cli": "operator"}
    made = {volume.split(":")[1]: volume.split(":")[0] for volume in services["users"]["volumes"]}
    for name in (*SERVICES, "cli"):
        user = users.get(name, name)
        assert services[name]["environment"]["REDIS_URL"] == f"redis://{user}@queue:6379/0"
        passwords = {volume for volume in mounts(services[name]).values() if volume.startswith("user_")}
        assert passwords == {made[f"/users/{user}"]}
    assert set(made) == {"/users/queue", *(f"/users/{user}" for user in table())}
    assert mounts(services["queue"])["/acl"] == made["/users/queue"]
    assert "--aclfile /acl/users.acl" in services["queue"]["command"][2]


def test_no_secret_is_in_the_environment_or_in_a_command() -> None:
    known = {
        "LORAFLEET_SECRET_FILE", "LORAFLEET_REDIS_PASSWORD_FILE", "HF_TOKEN_PATH", "AWS_SHARED_CREDENTIALS_FILE",
    }  # fmt: skip  # paths
    for service in compose().values():
        assert not {
            name for name in service.get("environment", {})
            if re.search("SECRET|PASSWORD|TOKEN|AWS|KEY$", name) and name not in known
        }  # fmt: skip
        assert "requirepass" not in str(service.get("command"))


def test_containers_have_no_rights_that_they_do_not_need() -> None:
    for name, service in compose().items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["user"] not in ("", "0", "root"), name
        assert service["deploy"]["resources"]["limits"].keys() == {"memory", "pids"}, name


def test_who_has_ports_and_who_gets_outside() -> None:
    services, known = compose(), yaml.safe_load(COMPOSE)["networks"]
    assert [name for name, service in services.items() if "ports" in service] == ["gateway", "grafana"]
    assert {name for name, service in services.items() if "outside" in networks(service)} == {"model", "adapter_store"}
    assert known["queue"]["internal"]
    assert known["fleet"]["internal"]
    assert known["front"]["driver_opts"] == {"com.docker.network.bridge.enable_ip_masquerade": "false"}
    assert networks(services["queue"]) == {"fleet", "queue"}
    assert networks(services["gateway"]) == {"fleet", "front"}
    assert networks(services["adapter_store"]) == {"fleet", "outside", "s3"}
    assert networks(services["gpu_worker"]) == networks(services["cuda_worker"]) == {"fleet"}
    assert networks(services["scheduler"]) == networks(services["cli"]) == {"queue"}
    assert services["users"]["network_mode"] == "none"
    observers = {name for name, service in services.items() if service.get("profiles") == ["observe"]}
    assert observers == {"prometheus", "traces", "grafana"}
    assert networks(services["grafana"]) == {"observe", "front"}  # it cannot reach any service of the fleet
    assert known["observe"]["internal"]
    of_s3 = {name for name, service in services.items() if service.get("profiles") == ["s3"]}
    assert of_s3 == {"s3_keys", "s3", "s3_bucket"}
    assert networks(services["s3"]) == networks(services["s3_bucket"]) == {"s3"}
    assert services["s3_keys"]["network_mode"] == "none"
    assert known["s3"]["internal"]


def test_the_queue_refuses_writes_before_its_container_is_full() -> None:
    queue = compose()["queue"]
    assert "--maxmemory 1536mb --maxmemory-policy noeviction" in queue["command"][2]
    assert queue["deploy"]["resources"]["limits"]["memory"] == "2g"


def test_whatever_clients_ask_for_fits_the_gateways_container() -> None:
    gateway = compose()["gateway"]
    given = gateway["environment"]
    settings = Settings(
        gateway_memory=given["LORAFLEET_GATEWAY_MEMORY"], max_connections=given["LORAFLEET_MAX_CONNECTIONS"]
    )  # fmt: skip
    most = sum(gateway_bytes(settings, Crowd(10**6, settings.max_connections)).values())
    assert gateway["deploy"]["resources"]["limits"]["memory"] == "5g"
    assert most + START_BYTES + SANDBOX_BYTES < 5 << 30
