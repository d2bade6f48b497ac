"""`python -m examples.tours.tools.vllm_suite FOLDER TEST… [pytest's options]`: vLLM's tests of servers against fleets.

FOLDER is an unpacked source distribution of vLLM, which is not installed; a TEST is a path below `tests/entrypoints`.
The tests run unchanged. Stand-ins take the place of `vllm` and of the helpers that start servers: a server is a fleet
of the quickstart model, which is fetched if it is not there, by the name that the test gives it, an adapter of the Hub
is an example adapter. Tests that ask no server are left out. `anthropic` and `pybase64` must be installed too.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import inspect
import json
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import anthropic
import httpx2
import openai
import pytest
import transformers

from examples.tours.fleets import LORAFLEET, ROOT, quickstart_model, running

MODEL = quickstart_model()
TOKENIZER = transformers.AutoTokenizer.from_pretrained(MODEL)
CONTEXT = 8192  # tokens that the model was trained on
ADAPTER = ROOT / "examples" / "adapters" / "pirate"
CLIENT: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 600}
STAND_INS = ("vllm", "tests.utils", "tests.conftest", "tests.models")
FLAGS = {flag: flag for flag in ("--max-model-len", "--max-num-seqs", "--max-logprobs")} | {
    "--max-num-batched-tokens": "--max-step-tokens",
    "--root-path": "--path-prefix",
    "--enable-force-include-usage": "--force-include-usage",
    "--enable-per-request-metrics": "--per-request-metrics",
    "--return-tokens-as-token-ids": "--return-tokens-as-token-ids",
}
"""vLLM's flags that are a fleet's too. The others are about its engine, or not needed here."""


class Absent:
    """Whatever is not here: false, callable, and with an attribute of every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent()

    def __call__(self, *_: Any, **__: Any) -> Absent:
        """Return nothing better."""
        return Absent()

    def __bool__(self) -> bool:
        return False


class Server(ExitStack):
    """What the tests call a RemoteOpenAIServer: a fleet, until its block ends."""

    show_hidden_metrics = False

    def __init__(self, model: str, vllm_serve_args: list[str], **_: Any) -> None:
        super().__init__()
        data = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="vllm-suite-")))
        given = _arguments(vllm_serve_args)
        words = [*LORAFLEET, "up", str(MODEL), "--served-name", *given.get("--served-model-name", [str(model)])]
        words += ["--data", str(data), "--dtype", "float32", "--max-draft-tokens", "8", "--vllm-metrics"]
        words += ["--adapter-roots", f"{ADAPTER.parent},{tempfile.gettempdir()}"]
        if not all(value.isdigit() and int(value) <= CONTEXT for value in given.get("--max-model-len", [])):
            given.pop("--max-model-len")
        words += [word for flag, values in given.items() if flag in FLAGS for word in (FLAGS[flag], *values)]
        self.url_root = self.enter_context(
            running(words, ROOT / "build" / data.name, port=int(*given.get("--port", [])))
        )
        self.get_async_client = partial(openai.AsyncOpenAI, base_url=self.url_for("v1"), **CLIENT)
        self.get_async_client_anthropic = partial(anthropic.AsyncAnthropic, base_url=self.url_root, **CLIENT)
        for module in given.get("--lora-modules", []):
            name, path = list(json.loads(module).values())[:2] if module[0] == "{" else module.split("=")
            body = {"lora_name": name, "lora_path": path}
            httpx2.post(self.url_for("v1/load_lora_adapter"), json=body, timeout=60).raise_for_status()

    def url_for(self, *parts: str) -> str:
        """Return the URL of a path, which comes in parts."""
        return f"{self.url_root}/{'/'.join(part.strip('/') for part in parts if part)}"


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """What imports the modules of STAND_INS, and those below them, in place of the source distribution's."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """Return that of a module that is stood in for."""
        is_stood_in = f"{fullname}.".startswith(tuple(f"{name}." for name in STAND_INS))
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if is_stood_in else None

    def exec_module(self, module: ModuleType) -> None:
        """Fill a module: what it needs of these names, and of all others nothing."""
        module.__dict__.update(
            __getattr__=Absent().__getattr__,
            RemoteOpenAIServer=Server,
            ROCM_EXTRA_ARGS=[],
            ModelConfig=lambda *_, **__: SimpleNamespace(get_vocab_size=lambda: len(TOKENIZER)),
            download_weights_from_hf=lambda name, **_: name,
            get_tokenizer=lambda *_, **__: TOKENIZER,
            hf_api=lambda: SimpleNamespace(snapshot_download=lambda *_, **__: str(ADAPTER)),
        )


def _arguments(words: list[str]) -> dict[str, list[str]]:
    """Return the values of each `--flag value…` or `--flag=value`; an underscore is a hyphen."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            values = found[flag.replace("_", "-")] = [value] if equals else []
        else:
            values.append(word)
    return found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that no fixture, and no line of their own, starts a server for."""

    def asks(item: Any) -> bool:
        fixtures = [found[-1].func for found in item._fixtureinfo.name2fixturedefs.values()]
        return any("RemoteOpenAIServer(" in inspect.getsource(made) for made in (item.obj, *fixtures))

    config.hook.pytest_deselected(items=[item for item in items if not asks(item)])
    items[:] = [item for item in items if asks(item)]


def main() -> int:
    """Run the tests; return pytest's status."""
    folder, *words = sys.argv[1:]
    below = Path(folder).resolve() / "tests" / "entrypoints"
    sys.meta_path.insert(0, StandIns())
    transformers.AutoTokenizer.from_pretrained = lambda *_, **__: TOKENIZER
    own = ["-p", "no:randomly", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto", "-c", "/dev/null"]
    own += ["--rootdir", str(below.parent), "--confcutdir", str(below)]
    chosen = [str(below / word) if (below / word.partition("::")[0]).exists() else word for word in words]
    return pytest.main([*own, *chosen], plugins=[sys.modules[__name__]])


if __name__ == "__main__":
    sys.exit(main())
