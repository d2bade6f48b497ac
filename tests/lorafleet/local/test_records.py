"""Commands find the fleets that run on this machine, and no others; they show their logs and stop them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from helpers.waiting import wait_until
from msgspec import structs

from lorafleet.__main__ import main
from lorafleet.launcher import records
from lorafleet.launcher.embedded import start_embedded
from lorafleet.launcher.records import LocalFleet, registered, running
from lorafleet.shared.api import Api, add_flags
from lorafleet.shared.parser import Parser
from lorafleet.up import own_key
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest

RUN = """
import os, signal, sys, threading, time
from lorafleet.launcher.records import LocalFleet, registered
ended, num = threading.Event(), int(sys.argv[3])
def stop(*_):
    global num
    num -= 1
    if num == 0:
        ended.set()
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
with registered(LocalFleet(os.getpid(), sys.argv[1], "tiny", sys.argv[2], sys.argv[2], time.time())):
    print("registered", flush=True)
    ended.wait()
"""
FLEET = LocalFleet(os.getpid(), "http://127.0.0.1:1", "tiny", "/data", "/logs", 1.0)

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder another user's")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    for name in ("LORAFLEET_URL", "REDIS_URL", "LORAFLEET_PROFILE", "XDG_CONFIG_HOME", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "run" / "lorafleet"


@contextmanager
def fleet_process(url: str, data: Path, num_signals: int = 1) -> Iterator[subprocess.Popen[str]]:
    """Run a process that looks like a fleet until it has handled `num_signals` signals."""
    command = [sys.executable, "-c", RUN, url, str(data), str(num_signals)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "registered\n"
            yield process
        finally:
            process.kill()


def test_a_record_is_there_while_its_fleet_runs_and_is_private(folder: Path) -> None:
    assert running() == []
    with registered(FLEET):
        assert running() == [FLEET]
        (path,) = folder.glob("*.json")
        assert (path.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o600, 0o700)
    assert list(folder.iterdir()) == []


def test_a_fleet_that_was_killed_is_not_found(folder: Path, tmp_path: Path) -> None:
    with fleet_process("http://127.0.0.1:1", tmp_path) as process:
        assert [fleet.pid for fleet in running()] == [process.pid]
        process.kill()
        process.wait()
        assert list(folder.glob("*.json")) != []
        assert running() == []
        assert list(folder.glob("*.json")) == []


def test_what_is_no_record_is_passed_over(folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o700)
    (folder / "other.json").write_text("{}")
    (folder / "link.json").symlink_to("/etc/passwd")
    assert running() == []


@pytest.mark.parametrize("url", ["http://[", "http://localhost:port", "http://other:1"])
def test_a_url_of_no_fleet_is_one_message(folder: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with registered(FLEET):
        assert main(["stop", "--url", url]) == 2
    assert capsys.readouterr().err.startswith("lorafleet stop: error: ")


def test_the_variable_names_the_fleet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(records.URL_VARIABLE, raising=False)
    other = structs.replace(FLEET, pid=FLEET.pid + 1, url="http://127.0.0.1:2")
    with registered(FLEET), registered(other):
        with pytest.raises(BadRequest, match="choose one"):
            records.chosen("")
        monkeypatch.setenv(records.URL_VARIABLE, "http://localhost:2/")
        assert records.chosen("") == other
        assert records.chosen(FLEET.url) == FLEET


@pytest.mark.parametrize("runtime", ["none", "/proc/none"])
def test_looking_for_fleets_needs_no_folder_and_makes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runtime: str
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / runtime))
    assert running() == []
    assert main(["status"]) == 1
    assert "no fleet runs on this machine" in capsys.readouterr().out
    assert main(["stop"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_records_are_not_believed_where_others_may_write(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record written by another user could name an address, which would then be sent this user's key."""
    with registered(FLEET):
        folder.chmod(0o777)
        assert running() == []
        folder.chmod(0o700)
        assert running() == [FLEET]
        (tmp_path / "lorafleet").symlink_to(folder)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        assert running() == []


@only_root
def test_another_users_records_are_not_believed(folder: Path) -> None:
    with registered(FLEET):
        os.chown(folder, 12_345, -1)
        assert running() == []


def modes(within: Path) -> dict[Path, int]:
    return {path: path.lstat().st_mode for path in within.rglob("*")}


@pytest.mark.parametrize(
    "place", ["unreachable", "a link", "a file", pytest.param("another user's", marks=only_root), "in the way"]
)
def test_a_fleet_runs_without_a_record_where_none_can_be_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    """Without XDG_RUNTIME_DIR, any user may have created a file or folder at the path of the folder of records."""
    mine = tmp_path / "mine"
    mine.mkdir()
    mine.chmod(0o755)
    folder.parent.mkdir()
    if place == "unreachable":
        monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc/none")
    elif place == "a link":
        folder.symlink_to(mine)
    elif place == "a file":
        folder.write_text("")
    elif place == "another user's":
        folder.mkdir()
        folder.chmod(0o755)
        os.chown(folder, 12_345, -1)
    else:
        (folder / f"{FLEET.pid}.json").mkdir(parents=True)
        folder.chmod(0o700)
    before = modes(tmp_path)
    with registered(FLEET):
        assert running() == []
    assert "other commands find this fleet only by --url" in caplog.text
    assert modes(tmp_path) == before


def test_of_several_fleets_one_has_to_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fleet_process("http://127.0.0.1:1", tmp_path), fleet_process("http://127.0.0.1:2", tmp_path):
        for words in (["workers", "list"], ["stop"], ["logs"], ["keys", "list"], ["dlq", "list"]):
            assert main(words) == 2
            told = capsys.readouterr().err
            assert "2 fleets run on this machine: http://127.0.0.1:" in told
            assert f"choose one with {'--data' if words[0] == 'keys' else '--url'}" in told
            assert f"data in {tmp_path}" in told
        assert main(["doctor"]) == 2
        assert "choose one with --url" in capsys.readouterr().err
        assert main(["doctor", "--json", "--url", "http://localhost:2"]) == 1
        found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
        assert "http://localhost:2" in found["gateway"]["text"]
        assert str(tmp_path) in found["disk"]["text"]
        assert main(["workers", "list", "--url", "http://127.0.0.1:2"]) == 1
        assert "cannot reach the gateway at http://127.0.0.1:2" in capsys.readouterr().err
        assert main(["status", "--json"]) == 1
        told = json.loads(capsys.readouterr().out)
        assert [(one["url"], one["state"]) for one in told] == [
            ("http://127.0.0.1:1", "unreachable"), ("http://127.0.0.1:2", "unreachable"),
        ]  # fmt: skip


async def test_stop_ends_a_fleet_and_waits_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stop"]) == 2
    assert "no fleet runs on this machine" in capsys.readouterr().err
    with fleet_process("http://127.0.0.1:1", tmp_path) as process:
        assert main(["stop", "--url", "http://127.0.0.1:9"]) == 2
        assert main(["stop"]) == 0
        assert process.wait() == 0
    assert "http://127.0.0.1:1 has stopped" in capsys.readouterr().out


def process_facts(pid: int) -> dict[str, str]:
    """Return the fields of the `status` file of a process in /proc, by name."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: text.strip() for name, _, text in (line.partition(":") for line in lines)}


async def test_stop_now_is_two_signals_however_late_they_are_handled(tmp_path: Path) -> None:
    codes: list[int] = []
    stopping = threading.Thread(target=lambda: codes.append(main(["stop", "--now"])))
    with fleet_process("http://127.0.0.1:1", tmp_path, num_signals=2) as process:
        process.send_signal(signal.SIGSTOP)
        await wait_until(lambda: process_facts(process.pid)["State"].startswith("T"), "the process stands still")
        stopping.start()
        await wait_until(lambda: int(process_facts(process.pid)["ShdPnd"], 16).bit_count() == 2, "two signals wait")
        process.send_signal(signal.SIGCONT)
        assert process.wait() == 0
    stopping.join()
    assert codes == [0]


def pid_of_nobody() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


async def test_a_fleet_that_ends_before_the_signal_has_stopped(capfd: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    stopping = threading.Thread(target=lambda: codes.append(main(["stop"])))
    with registered(msgspec.structs.replace(FLEET, pid=pid_of_nobody())):  # the process has ended; the lock remains
        stopping.start()
        seen = ""

        def is_stopping() -> bool:
            nonlocal seen
            seen += capfd.readouterr().out
            return "finishing accepted requests" in seen or not stopping.is_alive()

        await wait_until(is_stopping, "the signal was sent")
    stopping.join()
    assert codes == [0]
    assert "http://127.0.0.1:1 has stopped" in seen + capfd.readouterr().out


async def test_logs_show_the_last_lines_and_follow_new_ones(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gateway.log").write_text("one\ntwo\nthree\n")
    (tmp_path / "worker-0.log").write_text("loading\n")
    with fleet_process("http://127.0.0.1:1", tmp_path) as process:
        assert main(["logs", "-n", "2"]) == 0
        assert capfd.readouterr().out == "gateway   two\ngateway   three\nworker-0  loading\n"
        assert main(["logs", "gatway"]) == 2
        assert "did you mean gateway?" in capfd.readouterr().err
        following = threading.Thread(target=main, args=(["logs", "worker-0", "-f"],))
        following.start()
        seen = ""

        def is_shown(word: str) -> bool:
            nonlocal seen
            seen += capfd.readouterr().out
            return word in seen

        await wait_until(lambda: is_shown("loading"), "the last line is shown")
        with (tmp_path / "worker-0.log").open("a") as log:
            log.write("ready\nhalf")
        await wait_until(lambda: is_shown("ready"), "the new line is shown")
        process.send_signal(signal.SIGTERM)
        following.join()
    assert (seen + capfd.readouterr().out) == "loading\nready\n"


def test_the_key_of_the_fleet_is_sent_to_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "local.key").write_text("sk-lf-local\n")
    fleet = LocalFleet(os.getpid(), "http://127.0.0.1:1", "tiny", "/data", "/logs", 1.0, str(tmp_path / "local.key"))

    def key_of(*words: str, given: LocalFleet | None = None) -> str | None:
        parser = Parser()
        add_flags(parser)
        with Api(parser.parse_args(words), given) as api:
            return api._client.headers.get("authorization")

    with registered(fleet):
        assert key_of() == "Bearer sk-lf-local"
        assert key_of("--key", "sk-lf-mine") == "Bearer sk-lf-mine"
        assert key_of("--url", "http://127.0.0.1:1/") == "Bearer sk-lf-local"
        for other in (
            "http://127.0.0.1:2",
            "http://localhost:1",
            "https://127.0.0.1:1",
        ):  # who answers there is unknown
            assert key_of("--url", other) is None
        monkeypatch.setenv("LORAFLEET_URL", "http://127.0.0.1:1")
        assert key_of() == "Bearer sk-lf-local"
        monkeypatch.setenv("LORAFLEET_URL", "http://127.0.0.1:2")
        assert key_of() is None
    monkeypatch.delenv("LORAFLEET_URL")
    assert key_of() is None
    config = tmp_path / ".config" / "lorafleet" / "config.toml"
    config.parent.mkdir(parents=True)
    config.touch(mode=0o600)
    config.write_text('profile = "prod"\n[prod]\nurl = "https://prod"\nkey = "sk-lf-prod"\n')
    assert key_of() == "Bearer sk-lf-prod"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-lf-variable")
    assert key_of(given=fleet) == "Bearer sk-lf-local"
    assert key_of("--key", "sk-lf-mine", given=fleet) == "Bearer sk-lf-mine"
    assert key_of(given=msgspec.structs.replace(fleet, key_file="")) is None


def test_a_fleet_with_keys_makes_one_for_its_user_and_keeps_it(tmp_path: Path) -> None:
    server = start_embedded(tmp_path / "queue", durable=False, guarded=True)
    try:
        settings = Settings(data=tmp_path, **server.door("operator"))
        path = own_key(settings)
        secret = path.read_text()
        assert path.stat().st_mode & 0o777 == 0o600
        assert own_key(settings).read_text() == secret

        async def found() -> tuple[str, list[str]]:
            bus = Bus(settings.queue_url())
            try:
                key = await bus.api_keys.find(secret)
                assert key is not None
                await bus.api_keys.revoke(key[0].id)
                return key[0].tenant, key[0].scopes
            finally:
                await bus.close()

        assert asyncio.run(found()) == ("local", ["infer", "adapters", "admin"])
        assert own_key(settings).read_text() != secret  # it was revoked
    finally:
        server.stop()
