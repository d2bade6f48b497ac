"""`python -m examples.tours.tools.suite vllm|sglang|tgi FOLDER TEST… [pytest's options]`: servers' tests, unchanged.

FOLDER is a checkout or an unpacked source distribution of that server, which is not installed. A TEST is a path below
its server tests: `tests/entrypoints`, `test/srt/openai_server` or `integration-tests/models`. Stand-ins replace the
server's package and the helpers that start servers. A server is a fleet of the quickstart model, downloaded if
necessary, served under the name in the test; an adapter of the Hub is an example adapter. Tests that start no server
are left out. `anthropic`, `pybase64` (vLLM), `text-generation`, `aiohttp` (TGI) must be installed.

TGI's snapshots are answers of other models. An answer equals a snapshot if it has each field of the snapshot with a
value of the same type, and if each item of a list has the structure of an item of the snapshot's list.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import sys
import tempfile
import unittest
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest

from examples.tours.fleets import LORAFLEET, ROOT, quickstart_model, running

CONTEXT = 8192  # tokens that the model was trained on
ADAPTERS = sorted(path.parent for path in (ROOT / "examples" / "adapters").glob("*/adapter_config.json"))
CLIENT: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 600}
FLAGS = {flag: flag for flag in ("--max-model-len", "--max-num-seqs", "--max-logprobs")} | {
    "--max-num-batched-tokens": "--max-step-tokens",
    "--root-path": "--path-prefix",
    "--enable-force-include-usage": "--force-include-usage",
    "--enable-per-request-metrics": "--per-request-metrics",
    "--return-tokens-as-token-ids": "--return-tokens-as-token-ids",
    "--context-length": "--max-model-len",
    "--context-len": "--max-model-len",
    "--max-running-requests": "--max-num-seqs",
    "--max-payload-size": "--max-body-bytes",
}
"""Flags of vLLM and SGLang that a fleet has too. The others concern their engines, or are not needed here."""


model_folder = cache(quickstart_model)


@cache
def tokenizer() -> Any:
    """Return the model's tokenizer."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(model_folder())


class Absent:
    """Stands for any missing object: false, callable, and with an attribute of every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent()

    def __call__(self, *_: Any, **__: Any) -> Absent:
        """Return another stand-in."""
        return Absent()

    def __bool__(self) -> bool:
        return False


class Fleet(ExitStack):
    """A fleet under the model name of a test, with an adapter for each that the test names."""

    def __init__(self, name: str, given: Mapping[str, list[str]], port: int = 0) -> None:
        super().__init__()
        data = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="suite-")))
        words = [*LORAFLEET, "up", str(model_folder()), "--served-name", name, "--dtype", "float32"]
        words += ["--data", str(data), "--max-draft-tokens", "8", "--vllm-metrics"]
        words += ["--adapter-roots", f"{ADAPTERS[0].parent},{tempfile.gettempdir()}"]
        for flag, values in given.items():
            is_beyond = FLAGS.get(flag) == "--max-model-len" and not (values[0].isdigit() and int(values[0]) <= CONTEXT)
            if flag in FLAGS and not is_beyond:
                words += [FLAGS[flag], *values]
        self.url = self.enter_context(running(words, ROOT / "build" / data.name, port=port))

    def load(self, adapters: Mapping[str, str]) -> None:
        """Load adapters. adapters: name -> path."""
        for name, path in adapters.items():
            body = {"lora_name": name, "lora_path": path}
            httpx2.post(f"{self.url}/v1/load_lora_adapter", json=body, timeout=60).raise_for_status()


def arguments(words: list[str]) -> dict[str, list[str]]:
    """Return the values of each `--flag value…` or `--flag=value`; an underscore counts as a hyphen."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            values = found[flag.replace("_", "-")] = [value] if equals else []
        else:
            values.append(word)
    return found


_RUNNING: dict[tuple[str, ...], Fleet] = {}
"""The running fleet, by model and flags; the next test that wants the same server reuses it."""


def _running_fleet(name: str, given: Mapping[str, list[str]], adapters: Sequence[str] = (), port: int = 0) -> Fleet:
    """Return the running fleet, or replace it by a new one if the flags differ. adapters: names to serve."""
    key = (name, *(word for flag in given if flag in FLAGS for word in (flag, *given[flag])), *adapters)
    if key not in _RUNNING:
        _end()
        _RUNNING[key] = Fleet(name, given, port)
        _RUNNING[key].load({one: str(ADAPTERS[i % len(ADAPTERS)]) for i, one in enumerate(adapters)})
    return _RUNNING[key]


def _end() -> None:
    while _RUNNING:
        _RUNNING.popitem()[1].close()


# ---------------------------------------------------------------- vLLM


class Server(ExitStack):
    """Replaces RemoteOpenAIServer of vLLM's tests by a fleet that runs during the block."""

    show_hidden_metrics = False

    def __init__(self, model: str, vllm_serve_args: list[str], **_: Any) -> None:
        super().__init__()
        import anthropic

        given = arguments(vllm_serve_args)
        [name] = given.get("--served-model-name", [str(model)])
        fleet = self.enter_context(Fleet(name, given, port=int(*given.get("--port", []))))
        self.url_root = fleet.url
        self.get_async_client = partial(openai.AsyncOpenAI, base_url=self.url_for("v1"), **CLIENT)
        self.get_async_client_anthropic = partial(anthropic.AsyncAnthropic, base_url=self.url_root, **CLIENT)
        for module in given.get("--lora-modules", []):
            adapter, path = list(json.loads(module).values())[:2] if module[0] == "{" else module.split("=")
            fleet.load({adapter: path})

    def url_for(self, *parts: str) -> str:
        """Return the URL of a path, given in parts."""
        return f"{self.url_root}/{'/'.join(part.strip('/') for part in parts if part)}"


def _starts_vllm(item: Any) -> bool:
    fixtures = [found[-1].func for found in item._fixtureinfo.name2fixturedefs.values()]
    return any("RemoteOpenAIServer(" in inspect.getsource(made) for made in (item.obj, *fixtures))


# ---------------------------------------------------------------- SGLang


class LogitProcessor:
    """SGLang's custom logit processor: code as a string."""

    def to_str(self) -> str:
        """Return any string."""
        return "code"


def _launch(model: str, base_url: str, other_args: Any = (), **_: Any) -> SimpleNamespace:
    given = arguments([str(word) for word in other_args])
    adapters = [word.partition("=")[0] for word in given.get("--lora-paths", [])]
    _running_fleet(str(model), given, adapters, port=urlsplit(base_url).port or 0)
    return SimpleNamespace(pid=0)


def _starts_sglang(item: Any) -> bool:
    made = getattr(item.parent.obj, "setUpClass", None)
    return made is not None and any(f"{name}(" in inspect.getsource(made) for name in ("launch_server", "setup_class"))


# ---------------------------------------------------------------- TGI


class Snapshot:
    """A test's snapshots, to which its answers are compared one after another."""

    def __init__(self, folder: Path, test: str) -> None:
        self._paths = [folder / f"{test}{end}.json" for end in ("", ".1", ".2", ".3")]

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, given: object) -> bool:
        found = differences(json.loads(self._paths.pop(0).read_text()), _plain(given))
        print(*found, sep="\n")
        return not found


def differences(expected: Any, given: Any, at: str = "") -> list[str]:
    """Return the differences of `given` from the structure of `expected`. Extra fields are allowed; null matches all.

    at: path of both values, for the messages.
    """
    if expected is None:
        return []
    if isinstance(expected, dict) and isinstance(given, dict):
        lacks = [f"{at}.{name} is not there" for name in expected.keys() - given.keys()]
        shared = [name for name in expected if name in given]
        return lacks + [line for name in shared for line in differences(expected[name], given[name], f"{at}.{name}")]
    if isinstance(expected, list) and isinstance(given, list):
        if expected and not given:
            return [f"{at} is empty"]
        found = [[differences(one, part, f"{at}[{i}]") for one in expected] for i, part in enumerate(given)]
        return [line for each in found if each for line in min(each, key=len)]
    kinds = (
        [bool]
        if isinstance(expected, bool)
        else [int, float]
        if isinstance(expected, int | float)
        else [type(expected)]
    )
    is_alike = isinstance(given, tuple(kinds)) and isinstance(given, bool) == isinstance(expected, bool)
    return [] if is_alike else [f"{at} is {given!r:.60}, which is no {kinds[0].__name__}"]


def _plain(given: Any) -> Any:
    if isinstance(given, list):
        return [_plain(one) for one in given]
    return json.loads(given.model_dump_json()) if hasattr(given, "model_dump_json") else given


class Tgi:
    """The fixtures of TGI's tests, as a pytest plugin."""

    @pytest.fixture(scope="module")
    def launcher(self) -> Callable[..., Any]:
        """Return a function that starts a server; servers with the same adapters share a fleet."""
        import text_generation

        @contextmanager
        def launch(*_: Any, lora_adapters: list[str] | None = None, **__: Any) -> Iterator[Any]:
            fleet = _running_fleet("tgi", {}, lora_adapters or [])

            async def health(*_: Any) -> None:
                pass

            yield SimpleNamespace(client=text_generation.AsyncClient(fleet.url, timeout=300), health=health)

        return launch

    @pytest.fixture
    def response_snapshot(self, request: pytest.FixtureRequest) -> Snapshot:
        """Return the object to which a test compares its answers."""
        module = Path(request.node.path)
        return Snapshot(module.parent / "__snapshots__" / module.stem, request.node.originalname)

    ignore_logprob_response_snapshot = generous_response_snapshot = response_snapshot

    @pytest.fixture(scope="module")
    def generate_load(self) -> Callable[..., Any]:
        """Return a function that sends the same request several times at once."""
        import asyncio

        async def load(client: Any, prompt: str, max_new_tokens: int, n: int, **fields: Any) -> list[Any]:
            asked = {"max_new_tokens": max_new_tokens, "decoder_input_details": True, **fields}
            return await asyncio.gather(*(client.generate(prompt, **asked) for _ in range(n)))

        return load


# ---------------------------------------------------------------- suites


@dataclass(frozen=True)
class Suite:
    """The tests of one server."""

    tests: str  # the folder that contains them
    names: Mapping[str, Any]  # attributes of its modules
    stand_ins: tuple[str, ...] = ()  # modules that are replaced on import
    kept: str = ""  # a folder whose modules are imported from the checkout
    starts_server: Callable[[Any], bool] = lambda item: True  # whether a test starts one


SUITES = {
    "vllm": Suite(
        "tests/entrypoints",
        {
            "RemoteOpenAIServer": Server,
            "ROCM_EXTRA_ARGS": [],
            "ModelConfig": lambda *_, **__: SimpleNamespace(get_vocab_size=lambda: len(tokenizer())),
            "download_weights_from_hf": lambda name, **_: name,
            "get_tokenizer": lambda *_, **__: tokenizer(),
            "hf_api": lambda: SimpleNamespace(snapshot_download=lambda *_, **__: str(ADAPTERS[-1])),
        },
        ("vllm", "tests.utils", "tests.conftest", "tests.models"),
        starts_server=_starts_vllm,
    ),
    "sglang": Suite(
        "test/srt/openai_server",
        {
            "CustomLogitProcessor": LogitProcessor,
            "CustomTestCase": unittest.TestCase,
            "DEFAULT_MODEL_NAME_FOR_TEST": "meta-llama/Llama-3.1-8B-Instruct",
            "DEFAULT_SMALL_MODEL_NAME_FOR_TEST": "meta-llama/Llama-3.2-1B-Instruct",
            "DEFAULT_SMALL_MODEL_NAME_FOR_TEST_QWEN": "Qwen/Qwen2.5-1.5B-Instruct",
            "DEFAULT_TIMEOUT_FOR_SERVER_LAUNCH": 600,
            "DEFAULT_URL_FOR_TEST": "http://127.0.0.1:18130",
            "get_tokenizer": lambda *_, **__: tokenizer(),
            "is_npu": lambda: False,
            "kill_process_tree": lambda *_, **__: None,
            "popen_launch_server": _launch,
        },
        ("sglang",),
        kept="python/sglang/test/kits",
        starts_server=_starts_sglang,
    ),
    "tgi": Suite("integration-tests/models", {}),
}


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the modules of a suite's `stand_ins`, and those below them, in place of the distribution's."""

    def __init__(self, suite: Suite, folder: Path) -> None:
        self._suite, self._folder = suite, folder

    def find_spec(self, fullname: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of a module that is replaced, or that comes from the checkout."""
        own = self._folder.joinpath(*Path(self._suite.kept).parts[:-1], *fullname.split(".")[-2:]).with_suffix(".py")
        if self._suite.kept and own.parent.name == Path(self._suite.kept).name and own.is_file():
            return importlib.util.spec_from_file_location(fullname, own)
        is_stood_in = f"{fullname}.".startswith(tuple(f"{name}." for name in self._suite.stand_ins))
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if is_stood_in else None

    def exec_module(self, module: ModuleType) -> None:
        """Fill a module with the suite's names, and stand-ins for all other names."""
        module.__dict__.update(self._suite.names, __getattr__=Absent().__getattr__)


class Chosen:
    """A pytest plugin that deselects tests which start no server."""

    def __init__(self, suite: Suite) -> None:
        self._suite = suite

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Deselect those tests."""
        kept = [item for item in items if self._suite.starts_server(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def main() -> int:
    """Run the tests; return pytest's exit status."""
    name, folder, *words = sys.argv[1:]
    suite, root = SUITES[name], Path(folder).resolve()
    below = root / suite.tests
    sys.meta_path.insert(0, StandIns(suite, root))
    own_tokenizer = tokenizer()
    sys.modules["transformers"].AutoTokenizer.from_pretrained = lambda *_, **__: own_tokenizer
    own = ["-p", "no:randomly", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto", "-c", "/dev/null"]
    own += ["--rootdir", str(below.parent), "--confcutdir", str(below)]
    if name == "tgi":  # TGI's client, and the modules next to its tests
        sys.path[:0] = [str(below), str(root / "clients" / "python")]
    chosen = [str(below / word) if (below / word.partition("::")[0]).exists() else word for word in words]
    try:
        return pytest.main([*own, *chosen], plugins=[Chosen(suite), *([Tgi()] if name == "tgi" else [])])
    finally:
        _end()


if __name__ == "__main__":
    sys.exit(main())
