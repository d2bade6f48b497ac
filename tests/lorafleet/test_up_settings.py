"""Flags override variables, which override the file; wrong values are reported in one line; settings reach services."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lorafleet import serve, up
from lorafleet.__main__ import main
from lorafleet.launcher.fleet import local_url, service_specs
from lorafleet.launcher.machine import claim_port, num_cores, visible_gpus
from lorafleet.shared.flags import NO_FLAG, add_settings, load_settings, sections
from lorafleet.shared.parser import Parser
from lorafleet.up import LaunchPlan, fleet_name, prepare
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest, Conflict


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["REDIS_URL", "LORAFLEET_CONFIG", *(f"LORAFLEET_{name.upper()}" for name in Settings.model_fields)]
    for name in names:
        monkeypatch.setenv(name, "")  # so that monkeypatch also removes a variable that the command line sets
        monkeypatch.delenv(name)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "my model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def load(*words: str) -> Settings:
    parser = Parser()
    add_settings(parser)
    return load_settings(parser.parse_args(words))


def error_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a wrong command line, which must exit with code 2, and return the single line that it prints."""
    try:
        code = main(words)
    except SystemExit as exit_:
        code = exit_.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


def test_every_setting_has_a_flag() -> None:
    parser = Parser()
    add_settings(parser)
    flags = {option for action in parser._actions for option in action.option_strings}
    assert {"--" + name.replace("_", "-") for name in Settings.model_fields if name not in NO_FLAG} <= flags
    assert parser.format_help()


def test_no_secret_can_be_given_where_everybody_reads_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "unknown argument --secret" in error_of(["up", "x/y", "--secret", "0123456789abcdef"], capsys)
    words = ["up", "x/y", "--redis-url", "redis://user:hunter2@h/0"]
    printed = error_of(words, capsys)
    assert "--redis-password-file" in printed
    assert "hunter2" not in printed
    printed = error_of(["up", "x/y", "--prometheus-url", "https://user:hunter2@h/"], capsys)
    assert "LORAFLEET_PROMETHEUS_URL" in printed
    assert "hunter2" not in printed
    monkeypatch.setenv("REDIS_URL", "http://user:hunter2@h/0")
    assert "hunter2" not in error_of(["up", "x/y"], capsys)


def test_help_shows_the_main_settings_and_that_of_all_groups_the_others() -> None:
    listed = [name for names in sections().values() for name in names]
    assert listed == list(Settings.model_fields)
    for module in (up, serve):
        parser = Parser()
        module.add_arguments(parser)
        main_part, *groups = parser.format_whole_help().split("settings of ")
        assert parser.format_help().count("settings of ") == 0
        assert all(f"--{name.replace('_', '-')}" in main_part for name in module.MAIN_FLAGS)
        assert [group.partition(":")[0] for group in groups] == list(sections())
        assert "--max-queued " in groups[1]
        assert "--kernels " in groups[3]


def test_a_flag_wins_over_a_variable_and_a_variable_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "fleet.toml"
    config.write_text('port = 1001\nworkers = 3\nmodel = "from/file"\nprefix_cache = false\n')
    monkeypatch.setenv("LORAFLEET_PORT", "1002")
    monkeypatch.setenv("LORAFLEET_WORKERS", "4")
    settings = load("--config", str(config), "--port", "1003", "--compile")
    assert (settings.port, settings.workers, settings.model) == (1003, 4, "from/file")
    assert (settings.prefix_cache, settings.compile) == (False, True)
    assert load("--prefix-cache").prefix_cache


def test_redis_url_is_read_under_its_common_name_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://common:1")
    assert load().redis_url == "redis://common:1"
    monkeypatch.setenv("LORAFLEET_REDIS_URL", "redis://ours:1")
    assert load().redis_url == "redis://ours:1"
    assert load("--redis-url", "redis://flag:1").redis_url == "redis://flag:1"


def test_settings_survive_the_way_to_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(adapters=Path("/adapters"), prefix_cache=False, grace_s=1.5, device="cuda", served_name="a b")
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["upp"], "unknown command 'upp'"),
        (["up"], "MODEL is missing"),
        (["up", "x/y", "--port", "web"], "--port: must be a valid integer"),
        (["up", "x/y", "--prometheus-url", "h:9090"], "--prometheus-url: expected: http(s) URL of a Prometheus that"),
        (["up", "x/y", "--prometheus-url", "http://[h"], "--prometheus-url: 'http://[h' is not a URL"),
        (["up", "x/y", "--redis-url", "redis://[h"], "--redis-url: 'redis://[h' is not a URL"),
        (["up", "x/y", "--port", "70000"], "--port: must be less than or equal to 65535"),
        (["up", "x/y", "--device", "tpu"], "--device: must be 'auto', 'cpu' or 'cuda', not 'tpu'"),
        (["up", "x/y", "--workers", "-1"], "--workers: must be greater than or equal to 0"),
        (["up", "x/y", "--prot", "1"], "unknown argument --prot; did you mean --port?"),
        (["up", "./nowhere", "--port", "0"], "'./nowhere' is neither a folder nor a Hub id"),
        (["up", "x/y", "--adapters", "./nowhere"], "--adapters: nowhere is not a folder"),
        (["up", "x/y", "--config", "./nowhere.toml"], "no such file: ./nowhere.toml"),
        (["up", "x/y", "--redis-url", "http://host"], "--redis-url: "),
        (["serve", "cook"], "'cook' is not one of gateway"),
        (["serve", "worker"], "--model: the worker needs"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_exit_code_2(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in error_of(words, capsys)


def test_a_model_that_cannot_be_fetched_is_one_line_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lorafleet", "up", "x/y", "--port", "0", "--data", str(tmp_path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert "cannot fetch x/y from the Hub: " in done.stderr


def test_a_wrong_value_names_the_variable_or_file_it_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "fleet.toml"
    config.write_text("prot = 1\n")
    monkeypatch.setenv("LORAFLEET_PROT", "1")
    assert "LORAFLEET_PROT: no such setting; did you mean LORAFLEET_PORT?" in error_of(["up", "x/y"], capsys)
    monkeypatch.delenv("LORAFLEET_PROT")
    monkeypatch.setenv("LORAFLEET_URL", "http://a")  # a variable read by commands that ask a fleet
    assert "MODEL is missing" in error_of(["up"], capsys)
    monkeypatch.delenv("LORAFLEET_URL")
    monkeypatch.setenv("LORAFLEET_PORT", "web")
    assert "LORAFLEET_PORT: " in error_of(["up", "x/y"], capsys)
    assert f"{config}: prot: Extra inputs" in error_of(["up", "x/y", "--config", str(config)], capsys)
    config.write_text("port = = 1\n")
    assert f"{config}: Invalid value (at line 1" in error_of(["up", "x/y", "--config", str(config)], capsys)


def test_a_port_in_use_is_refused_before_anything_starts(model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Conflict, match=f"port {port} on 127.0.0.1 is in use"):
            prepare(Settings(model=str(model), port=port, data=tmp_path / "data"))
    assert not (tmp_path / "data").exists()
    assert claim_port("127.0.0.1", 0) > 0
    with pytest.raises(BadRequest, match=r"cannot listen on 192\.0\.2\.1"):
        claim_port("192.0.2.1", 0)


def test_preparing_makes_folders_absolute_and_picks_a_port(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = prepare(Settings(model="my model", adapters=Path(), data=Path("data"), port=0)).settings
    assert settings.model == str(model)
    assert settings.adapters == tmp_path
    assert settings.data == tmp_path / "data"
    assert settings.served_name == "my model"
    assert settings.port > 0


def test_each_model_has_its_own_queue(model: Path, tmp_path: Path) -> None:
    one = prepare(Settings(model=str(model), data=tmp_path, port=0)).settings
    assert fleet_name(one) == fleet_name(one.model_copy(update={"port": 1}))
    assert fleet_name(one) != fleet_name(one.model_copy(update={"model": "other/model"}))


def test_workers_share_cores_gpus_and_ports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    made = service_specs(Settings(workers=3, metrics_port=9100), tmp_path, cores=8)
    specs = {spec.name: spec.environment for spec in made}
    assert list(specs) == ["store", "scheduler", "gateway", "worker-0", "worker-1", "worker-2"]
    workers = [specs[f"worker-{i}"] for i in range(3)]
    assert [worker["CUDA_VISIBLE_DEVICES"] for worker in workers] == ["3", "5", "3"]
    assert {worker["LORAFLEET_THREADS"] for worker in workers} == {worker["OMP_NUM_THREADS"] for worker in workers}
    assert workers[0]["LORAFLEET_THREADS"] == "2"
    assert len({environment["LORAFLEET_METRICS_PORT"] for environment in specs.values()}) == 6
    on_cpu = service_specs(Settings(workers=1, device="cpu"), tmp_path)
    assert on_cpu[-1].environment["CUDA_VISIBLE_DEVICES"] == "3,5"  # unchanged


def test_cores_are_cut_by_a_container_quota(tmp_path: Path) -> None:
    limit = tmp_path / "cpu.max"
    everything = num_cores(limit)
    limit.write_text("max 100000\n")
    assert num_cores(limit) == everything
    limit.write_text("50000 100000\n")
    assert num_cores(limit) == 1


def test_gpus_are_those_the_user_left_visible() -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-1, 2"}) == ["GPU-1", "2"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []


def test_the_example_asks_as_the_model_can_answer(model: Path) -> None:
    plan = LaunchPlan(Settings(model=str(model), host="0.0.0.0", port=8001), model)
    assert "http://127.0.0.1:8001/v1/completions" in plan.curl("it's")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert "/v1/chat/completions" in plan.curl("it's")
    assert "/v1/embeddings" in plan.curl("it's", does="feature-extraction")
    assert ":8001/classify" in plan.curl("it's", does="token-classification")
    assert "/v1/classify" in plan.curl("it's", does="text-classification")
    assert local_url(Settings(host="::")) == "http://[::1]:8000"
