"""Child processes get only the variables that they need, and a service removes the secrets that it has read."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from protocol.runtime.environment import COMPUTE, SERVICES, child_environment, forget_secrets

ROOT = Path(__file__).parents[3]
SECRETS = {
    "LORAFLEET_SECRET": "s", "REDIS_URL": "redis://:p@h", "LORAFLEET_REDIS_URL": "redis://:p@h", "HF_TOKEN": "hf_x",
    "HF_TOKEN_PATH": "/t", "HUGGING_FACE_HUB_TOKEN": "hf_y", "AWS_SECRET_ACCESS_KEY": "k", "AWS_SESSION_TOKEN": "t",
    "OPENAI_API_KEY": "sk-x", "GITHUB_TOKEN": "g", "DATABASE_URL": "postgres://:p@h",
}  # fmt: skip
HUB = {"HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"}
AWS = {"AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SECRETS, "OMP_NUM_THREADS": "1", "PYTHONPATH": ".", "CXX": "g++"}.items():
        monkeypatch.setenv(name, value)


def test_a_child_gets_no_secret_by_default() -> None:
    found = child_environment()
    assert not found.keys() & SECRETS.keys()
    assert {"PATH", "PYTHONPATH", "OMP_NUM_THREADS"} <= found.keys()
    assert "CXX" in child_environment(*COMPUTE)


def test_only_the_store_gets_credentials_of_sources() -> None:
    for service, patterns in SERVICES.items():
        expected = HUB | AWS if service == "store" else set()
        assert child_environment(*patterns).keys() & SECRETS.keys() == expected, service


@pytest.mark.parametrize(
    ("service", "kept"), [("gateway", HUB), ("worker", HUB), ("scheduler", set[str]()), ("store", HUB | AWS)]
)
def test_a_service_forgets_what_it_has_read(service: str, kept: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    forget_secrets(service)
    mine = {"LORAFLEET_SECRET", "REDIS_URL", "LORAFLEET_REDIS_URL"} | HUB | AWS
    assert os.environ.keys() & mine == kept


def test_every_child_is_given_an_environment() -> None:
    """A child without `env=` would inherit all variables."""
    starters = {"Popen", "run", "check_call", "check_output", "create_subprocess_exec", "create_subprocess_shell"}
    modules = {"subprocess", "asyncio"}
    missing: list[str] = []
    number = 0
    for package in (
        "protocol",
        "gateway",
        "scheduler",
        "gpu_worker",
        "adapter_store",
        "lorafleet",
        "benchmarks",
        "chaos",
    ):
        for path in sorted((ROOT / package).rglob("*.py")):
            if not re.search(rf"\b({'|'.join(modules)})\.({'|'.join(starters)})\b", text := path.read_text()):
                continue
            for node in ast.walk(ast.parse(text)):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                owner = node.func.value
                if not (isinstance(owner, ast.Name) and owner.id in modules and node.func.attr in starters):
                    continue
                if (owner.id, node.func.attr) == ("asyncio", "run"):
                    continue
                number += 1
                if not any(word.arg == "env" for word in node.keywords):
                    missing.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert number >= 6, "the check would prove nothing"
    assert missing == []
