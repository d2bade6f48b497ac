"""The base model's files: a local folder, or a download from the Hub of the files that a service reads."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from pathlib import Path

from protocol.runtime.private_files import is_own, own_folder
from protocol.runtime.settings import Settings, names_of
from protocol.wire.errors import BadRequest

TOKENIZER_FILES = ("*.json", "*.jinja")
"""Patterns of the files that a gateway needs: tokenizer, chat template, configs."""

READ_BY_GATEWAYS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja",
)  # fmt: skip
MAX_TEXT_FILE_BYTES = 64 << 20
"""Maximum size of each of these files of a base that is added while the fleet runs. The largest known has 34 MB."""

MAX_FETCHED_BYTES = 4 * MAX_TEXT_FILE_BYTES
"""Maximum bytes fetched from the Hub for such a base."""

WEIGHT_FILES = (*TOKENIZER_FILES, "*.safetensors", "*.model")


QUANTISED_INDEX = "quantised.json"
"""File in the folder of a quantized model that says where its weights are; see `gpu_worker/quantised`."""

GGUF_LINK = "model.gguf"
"""Name of the link to the GGUF file in the folder that is made from it."""

GGUF_MAGIC = b"GGUF"

RESERVED = {
    "base": "means the default base",
    **dict.fromkeys(("hub", "s3", "local"), "begins the names of adapters at a source"),
}
"""Names that would make `base:adapter` ambiguous, and why."""

GGUF_FOLDERS = 1
"""Version of the folders that are made from GGUF files. A new version makes new folders."""


def is_gguf(path: Path) -> bool:
    """Return whether a path is a GGUF file, whatever its name: Ollama's files have no suffix."""
    try:
        if not path.is_file():  # opening a named pipe would wait for a writer
            return False
        with path.open("rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False


def gguf_folder(file: Path) -> Path:
    """Return the folder for the config and tokenizer of a GGUF file, which `lorafleet fetch` creates.

    A changed file has another folder.
    """
    status = file.resolve().stat()
    key = repr((GGUF_FOLDERS, str(file.resolve()), status.st_size, status.st_mtime_ns))
    return cache_folder() / "gguf" / hashlib.sha256(key.encode()).hexdigest()[:24]


def cache_folder() -> Path:
    """Return the cache folder for files made from models: $LORAFLEET_CACHE_DIR, else lorafleet/ in the user's cache.

    A folder that others may write is not used: see `own_folder`.
    """
    chosen = os.environ.get("LORAFLEET_CACHE_DIR")
    home = os.environ.get("XDG_CACHE_HOME")
    return own_folder(Path(chosen) if chosen else Path(home or Path.home() / ".cache") / "lorafleet")


def hold_folder(folder: Path) -> int:
    """Protect a folder from `prune_folders` until this process ends or closes the returned descriptor."""
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(held, fcntl.LOCK_SH)
    return held


def prune_folders(root: Path, num_kept: int) -> None:
    """Delete the least recently touched model folders in `root` until `num_kept` are left, except held ones.

    A folder that is still being made has no config and is kept.
    """
    folders = [path for path in root.iterdir() if (path / "config.json").is_file()]
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime_ns, reverse=True)[num_kept:]:
        try:
            own = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:  # another process has deleted it
            continue
        try:
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(own)


def model_folder(model: str, patterns: tuple[str, ...]) -> Path:
    """Return the folder of `model`, a path or a Hub id (fetched if needed). Raises BadRequest if it is neither.

    For a GGUF file it is the folder that `lorafleet fetch` or `lorafleet up` has made.
    """
    path = Path(model).expanduser()
    if is_gguf(path):
        folder = gguf_folder(path)
        if not is_own(folder) or not (folder / "config.json").is_file():
            raise BadRequest(f"{path} has not been prepared on this machine: run `lorafleet fetch {path}` first")
        return folder
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadRequest(f"{path} holds no config.json: it is not a model folder")
        return path
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise BadRequest(f"{model!r} is neither a folder nor a Hub id of the form org/name")
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
    # Imported here since it takes 0.1 s of every service's start, and most models are local.

    return Path(snapshot_download(model, allow_patterns=list(patterns)))


def is_here(model: str) -> bool:
    """Return whether a worker can load a model, an absolute path or a Hub id, without a download. Blocks.

    An unreadable path, such as a folder of another user, counts as missing.
    """
    path = Path(model)
    try:
        if path.is_absolute():
            return (path / "config.json").is_file() or (is_gguf(path) and (gguf_folder(path) / "config.json").is_file())
        from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]

        folder = Path(snapshot_download(model, local_files_only=True))
        return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))  # gateways fetch text files
    except (OSError, ValueError):  # not downloaded, or not a valid Hub id
        return False


def check_text_files(model: str) -> None:
    """Raise BadRequest unless the files of `model` that a gateway reads are regular files within the limits. Blocks.

    For a Hub id, sizes are checked before the download. Raises OSError if the Hub cannot be reached.
    """
    path = Path(model)
    if not path.is_absolute() and not path.is_dir():
        from huggingface_hub import constants, snapshot_download  # pyright: ignore[reportUnknownVariableType]

        if not constants.HF_HUB_OFFLINE:
            files = snapshot_download(model, allow_patterns=list(TOKENIZER_FILES), dry_run=True)
            if (total := sum(file.file_size or 0 for file in files)) > MAX_FETCHED_BYTES:
                raise BadRequest(f"the text files of {model} have {total} bytes; the limit is {MAX_FETCHED_BYTES}")
        path = Path(snapshot_download(model, allow_patterns=list(TOKENIZER_FILES)))
    if not path.is_dir() and not path.is_file():
        raise BadRequest(f"{model} is neither a folder nor a file here")
    for file in [path / name for name in READ_BY_GATEWAYS if (path / name).exists()]:
        if not file.is_file():
            raise BadRequest(f"{file} is not a regular file")
        if (size := file.stat().st_size) > MAX_TEXT_FILE_BYTES:
            raise BadRequest(f"{file} has {size} bytes; the limit is {MAX_TEXT_FILE_BYTES}")


def served_name(model: str, name: str) -> str:
    """Return the base model's name in the API: `name` if given, else the Hub id, or the folder's or file's name.

    The result is the same where the files are missing, as at a store.
    """
    if name:
        return name
    path = Path(model).expanduser()
    is_folder = os.path.isdir(path)  # `Path.is_dir` raises for an overlong name and in another user's folder
    if is_gguf(path) or (path.is_absolute() and not is_folder):
        return path.name.removesuffix(".gguf")
    return path.resolve().name if is_folder else model


def settings_of_further(settings: Settings, model: str, name: str) -> Settings:
    """Return the settings for serving a further base instead of `model`, without `model`'s draft model."""
    return settings.model_copy(update={"model": model, "served_name": name, "draft_model": ""})


def base_settings(settings: Settings) -> dict[str, Settings]:
    """Return name -> settings for each of a fleet's bases, beginning with the default base.

    Raises BadRequest if two bases have one name, or a name is reserved.
    """
    own = served_name(settings.model, settings.served_name)
    found = {own: settings.model_copy(update={"served_name": own})}
    for model in names_of(settings.more_models):
        name = served_name(model, "")
        if name in RESERVED:
            raise BadRequest(f"a further base model cannot be named {name}, which {RESERVED[name]}: rename its folder")
        if name in found:
            raise BadRequest(f"two base models of this fleet have the name {name}: rename the folder of one of them")
        found[name] = settings_of_further(settings, model, name)
    return found


def worker_bases(settings: Settings) -> dict[str, Settings]:
    """Return name -> settings for each base that a worker may serve, beginning with that of `model`.

    Unlike a gateway's, a worker's `more_models` may repeat its own `model`. Raises as `base_settings`.
    """
    own = served_name(settings.model, settings.served_name)
    others = [model for model in names_of(settings.more_models) if served_name(model, "") != own]
    return base_settings(settings.model_copy(update={"more_models": ",".join(others)}))
