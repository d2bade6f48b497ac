"""`lorafleet fetch` downloads or prepares the base models on this machine, so that services find them at start."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import httpx2

from lorafleet.quickstart import fetch_quickstart_model
from lorafleet.shared.flags import add_settings, load_settings
from lorafleet.shared.parser import Parser
from protocol.runtime.environment import COMPUTE, HUB_CACHE, child_environment
from protocol.runtime.model_files import WEIGHT_FILES, gguf_folder, is_gguf, model_folder, prune_folders
from protocol.runtime.settings import Settings, names_of
from protocol.wire.errors import BadRequest


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.description = (
        "Make sure that the base model is on this machine, and print its folder. A Hub id is downloaded to the cache of"
        " the Hub's client, a local folder is checked, and a GGUF file has its config and tokenizer extracted."
        " Without MODEL, SmolLM2-135M-Instruct is downloaded to the data folder. The models in"
        " LORAFLEET_MORE_MODELS and LORAFLEET_DRAFT_MODEL are downloaded too."
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default=argparse.SUPPRESS, help="a Hub id, a local folder or a GGUF file"
    )
    add_settings(parser, first=("data",), skip=tuple(Settings.model_fields))


def run(args: argparse.Namespace) -> int:
    """Fetch the models; return the exit code. Raises as `fetch_model`."""
    settings = load_settings(args)
    print(fetch_model(settings))
    drafting = [settings.draft_model] if settings.draft_model else []
    for model in [*names_of(settings.more_models), *drafting]:
        print(fetch_model(settings.model_copy(update={"model": model})))
    return 0


def fetch_model(settings: Settings) -> Path:
    """Return the folder of the base model, fetched if missing; the quickstart model if the settings name none.

    Raises BadRequest if `settings.model` is neither a model folder nor a Hub id that can be fetched, or if the data
    folder cannot be written. Raises QuickstartError if no source has the quickstart model.
    """
    if not settings.model:
        folder = settings.data / "models"
        try:
            return fetch_quickstart_model(folder)
        except OSError as error:
            raise BadRequest(f"--data: cannot write to {folder}: {error.strerror}") from error
    file = Path(settings.model).expanduser()
    if is_gguf(file):
        _make_gguf_folder(file, settings.kept_models)
    try:
        return model_folder(settings.model, WEIGHT_FILES)
    except (httpx2.HTTPError, OSError) as error:  # the Hub client's errors are OSErrors: not found, gated, unreachable
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadRequest(f"cannot fetch {settings.model} from the Hub: {reason}") from error


def _make_gguf_folder(file: Path, num_kept: int) -> None:
    """Make the folder of a GGUF file unless it exists, in its own process, so that this one does not import torch.

    num_kept: maximum number of such folders to keep. Raises BadRequest for an unsupported file.
    """
    folder = gguf_folder(file)
    if (folder / "config.json").is_file():
        folder.touch()
        return
    command = [sys.executable, "-m", "gpu_worker.loading.gguf_folder", str(file), str(folder)]
    environment = child_environment(*COMPUTE, *HUB_CACHE)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise BadRequest(lines[-1] if lines else f"reading {file} ended with code {done.returncode}")
    prune_folders(folder.parent, num_kept)
