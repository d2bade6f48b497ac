"""Every command as a user sees it in an 80-column terminal: right and wrong input, Ctrl-C, a prompt, the end."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from helpers.factories import make_adapter, make_tiny_model
from helpers.fleets import MARKER, QUICK
from helpers.processes import with_variable
from helpers.terminal import Terminal, terminal

from lorafleet.__main__ import COMMANDS

pytestmark = [
    pytest.mark.skipif(not shutil.which("tmux"), reason="tmux is not installed"),
    pytest.mark.timeout(300),
]

WRONG = (
    ("adapters add absent", 2, "no adapter folder"),
    ("adapters pin pirat", 2, "did you mean pirate?"),
    ("adapters check absent", 2, "is not a folder"),
    ("adapters", 2, "list|add|pin"),
    ("adaptors ls", 2, "did you mean adapters?"),
    ("workers drain nobody", 2, "no live worker nobody"),
    ("jobs show job_0", 2, "no job job_0"),
    ("batch run absent.jsonl", 2, "cannot read absent.jsonl"),
    ("batch show batch_0", 2, "no batch"),
    ("usage --days 0", 2, "--days: '0' is not a number from 1 to 31"),
    ("usage --by nothing", 2, "nothing"),
    ("dlq show nothing", 2, "nothing"),
    ("keys create --tenant t --scopes nothing", 2, "infer, adapters, admin"),
    ("keys revoke key_0", 2, "key_0"),
    ("explain nothing", 2, "no request nothing"),
    ("chat pirat", 2, "did you mean pirate?"),
    ("chat pirate < /dev/null", 2, "no message"),
    ("chat pirate hello --url http://127.0.0.1:9", 1, "cannot reach the gateway"),
    ("logs gatway", 2, "did you mean gateway?"),
    ("stop --url http://127.0.0.1:9", 2, "no fleet of this machine"),
    ("top --every nothing", 2, "nothing"),
    ("up", 2, "MODEL is missing"),
    ("up tiny --prot 1", 2, "did you mean --port?"),
    ("serve nothing", 2, "gateway, scheduler, worker, store"),
    ("bench --adapters 0 --no-plot", 2, "names no adapter"),
    ("bases add ./tiny", 2, "neither a Hub id"),
    ("bases remove nothing", 2, "no base nothing"),
    ("status --jsno", 2, "did you mean --json?"),
    ("audit --limit 0", 2, "less than 1"),
    ("doctor --workers many", 2, "--workers"),
    ("demo --api-keys", 2, "the demo does not send an API key"),
    ("users /proc/nothing", 2, "cannot write to /proc/nothing"),
    ("fetch ./absent", 2, "./absent"),
    ("profile", 2, "MODEL"),
    ("completion basj", 2, "did you mean bash?"),
)
"""Command, exit code, and text of its only message."""

RIGHT = (
    ("status", "ready"),
    ("adapters ls", "pirate"),
    ("adapters list --json | head -c 1", "["),
    ("adapters pin pirate", "resident"),
    ("adapters unpin pirate", "pirate"),
    ("adapters unpin pirate && lorafleet adapters evict pirate", "freed"),
    ("workers ls", "worker-0"),
    ("jobs ls", "no jobs"),
    ("batch run calls.jsonl", "2 of 2 lines answered"),
    ("batch ls", "completed"),
    ("usage", "tenant"),
    ("audit", "adapter.pin"),
    ("dlq ls", "no dead letters"),
    ("keys create --tenant t", "sk-lf-"),
    ("keys ls", "key_"),
    ("chat pirate hello there --max-tokens 3 --temperature 0", "[length]"),
    ("echo hello | lorafleet chat pirate --max-tokens 3 --json", '"finish_reason"'),
    ("logs -n 1", "worker-0"),
    ("bench --requests 2 --output-tokens 4 --no-plot", "0 failed"),
    ("top --once --every 0.2", "worker-0"),
    ("doctor", "is ready"),
    ("completion bash | head -1", "shtab"),
    ("bases ls", "tiny"),
    ("users passwords", "passwords/queue/users.acl"),
    ("fetch tiny", "tiny"),
    ("profile tiny --sequences 1 --steps 1 --out profile.json", "wrote profile.json"),
)
"""Command, and text that it prints."""

BEFORE = ("adapters pin haiku", "batch run calls.jsonl", "keys create --tenant before")
"""What lists show later: each test may run alone, and before every other."""


@contextmanager
def fleet_in(folder: Path) -> Iterator[tuple[Terminal, Terminal, str]]:
    """A terminal in which `lorafleet up` runs, a second terminal, and the marker of the first one's processes."""
    model = make_tiny_model(folder / "tiny", max_len=4096)
    for seed, name in enumerate(("pirate", "haiku"), start=1):
        make_adapter(folder / "adapters" / name, model, seed=seed)
    call = {"model": "pirate", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    lines = [{"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": call} for name in "ab"]
    (folder / "calls.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    marker = secrets.token_hex(8)
    (runtime := folder / "run").mkdir(mode=0o700)
    variables = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XDG_RUNTIME_DIR": str(runtime),  # hides other fleets of this machine
        "LORAFLEET_URL": "",
        "OPENAI_API_KEY": "",
        "OMP_NUM_THREADS": "1",
    }
    with terminal({**variables, MARKER: marker}) as first, terminal(variables, height=200) as second:
        for here in (first, second):
            here.type(f"cd {folder}")
        first.type(f"lorafleet up tiny --adapters adapters --data data --port 0 {' '.join(QUICK)}; echo rc=$?")
        services = (f"✓ {name}" for name in ("queue", "store", "scheduler", "gateway", "worker-0"))
        shown = first.wait_for("serves tiny and 2 adapters", "Ctrl-C", *services)
        assert "/console/" in shown
        yield first, second, marker


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Terminal, Terminal, str]]:
    """A fleet that has something to list."""
    with fleet_in(tmp_path_factory.mktemp("terminal")) as running:
        for command in BEFORE:
            printed, code = running[1].run(f"lorafleet {command}")
            assert code == 0, printed
        yield running


@pytest.mark.parametrize(("command", "code", "says"), WRONG, ids=lambda value: str(value))
def test_wrong_input_is_one_message(
    fleet: tuple[Terminal, Terminal, str], command: str, code: int, says: str
) -> None:  # fmt: skip
    printed, returned = fleet[1].run(f"lorafleet {command}")
    assert (returned, says in printed, "Traceback" in printed) == (code, True, False), printed
    assert len(printed.splitlines()) == 1, printed


@pytest.mark.parametrize(("command", "says"), RIGHT, ids=lambda value: str(value))
def test_commands_show_their_answer(fleet: tuple[Terminal, Terminal, str], command: str, says: str) -> None:
    printed, code = fleet[1].run(command if command.startswith("echo") else f"lorafleet {command}")
    assert (code, says in printed, "Traceback" in printed) == (0, True, False), printed


def test_a_request_is_explained(fleet: tuple[Terminal, Terminal, str]) -> None:
    printed, _ = fleet[1].run("lorafleet status --json")
    (ended, *_) = httpx2.get(f"{json.loads(printed)[0]['url']}/v1/requests").json()["data"]
    printed, code = fleet[1].run(f"lorafleet explain {ended['id']}")
    assert (code, "prompt tokens" in printed, "completed" in printed) == (0, True, True), printed


def test_the_tour_has_every_command() -> None:
    elsewhere = {"up", "stop", "explain", "serve", "demo"}  # in other tests of this file, and in test_demo.py
    right = {command.removeprefix("echo hello | lorafleet ").split()[0] for command, _ in RIGHT}
    assert {command.split()[0] for command, *_ in WRONG} >= set(COMMANDS)
    assert right | elsewhere == set(COMMANDS)


def test_lists_fit_the_terminal(fleet: tuple[Terminal, Terminal, str]) -> None:
    """What does not fit a table is shown with a line per value; nothing is cut."""
    for command in ("status", "adapters ls", "workers ls", "audit", "keys ls"):
        printed, _ = fleet[1].run(f"lorafleet {command}")
        wide = [line for line in printed.splitlines() if len(line) > 80]
        assert not [line for line in wide if len(line.split()) > 3], printed
        assert "…" not in printed


def test_a_chat_is_led_at_its_prompt(fleet: tuple[Terminal, Terminal, str]) -> None:
    here = fleet[1]
    here.clear()
    here.type("lorafleet chat haiku --max-tokens 4 --temperature 0; echo rc=$?")
    here.wait_for("/quit exits")
    here.type("hello")
    here.wait_for("[length]")
    here.type("/nonsense")
    here.wait_for("unknown command /nonsense: /reset")
    for typed, says in (
        ("/modle", "unknown command /modle; did you mean /model?"),
        ("/model", "chatting with haiku"),
        ("/undo", "removed the last question"),
        ("/undo", "there is no question to remove"),
        ("/reset", "new chat"),
    ):
        here.type(typed)
        here.wait_for(says)
    here.type("/model pirat")
    here.wait_for("did you mean pirate?")
    here.type("/model pirate")
    here.wait_for("chatting with pirate")
    here.press("C-c")
    here.type("hello again")
    assert "Traceback" not in here.wait_for("[length]", times=2)
    here.press("C-d")
    here.wait_for("rc=0")


@pytest.mark.parametrize("command", ["top", "logs --follow", "top --json"])
def test_what_runs_on_ends_at_ctrl_c(fleet: tuple[Terminal, Terminal, str], command: str) -> None:
    here = fleet[1]
    here.clear()
    here.type(f"lorafleet {command}; echo rc=$?")
    shown = here.wait_for("worker-0")
    assert "…" not in shown or command != "top"
    here.press("C-c")
    assert "Traceback" not in here.wait_for("rc=130")


def test_the_fleet_stops_from_another_terminal(tmp_path: Path) -> None:
    with fleet_in(tmp_path) as (first, second, marker):
        printed, code = second.run("lorafleet stop")
        assert code == 0, printed
        assert "Traceback" not in first.wait_for("rc=0")
        printed, code = second.run("lorafleet status")
        assert (code, "no fleet runs on this machine" in printed) == (1, True), printed
        assert not [one for one in with_variable(MARKER, marker) if "lorafleet" in " ".join(one.cmdline())]
