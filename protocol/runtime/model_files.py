"""The base model's files: a local folder, or a download from the Hub of those files that a service reads."""

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
"""Patterns of what the gateway needs: tokenizer, chat template, configs."""

READ_BY_GATEWAYS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja",
)  # fmt: skip
MAX_TEXT_FILE_BYTES = 64 << 20
"""Largest of these of a base that is added while the fleet runs. The largest known has 34 MB."""

MAX_FETCHED_BYTES = 4 * MAX_TEXT_FILE_BYTES
"""Most that is fetched of such a base."""

WEIGHT_FILES = (*TOKENIZER_FILES, "*.safetensors", "*.model")


QUANTISED_INDEX = "quantised.json"
"""Says where the weights of a folder that is served quantised lie; see `gpu_worker/quantised`."""

GGUF_LINK = "model.gguf"
"""Name of the link to the file in the folder that is made of a GGUF model."""

GGUF_MAGIC = b"GGUF"

RESERVED = {
    "base": "means the default base",
    **dict.fromkeys(("hub", "s3", "local"), "begins the names of adapters at a source"),
}
"""Names that `base:adapter` would make ambiguous, and why."""

GGUF_FOLDERS = 1
"""Version of what is made of a GGUF file. A new one makes new folders."""


def is_gguf(path: Path) -> bool:
    """Return whether a path is a GGUF file, whatever its name: Ollama's have none that says so."""
    try:
        if not path.is_file():  # opening a named pipe would wait for its writer
            return False
        with path.open("rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False


def gguf_folder(file: Path) -> Path:
    """Return where the config and tokenizer of a GGUF file are kept, which `lorafleet fetch` makes.

    A file that has changed has another folder.
    """
    status = file.resolve().stat()
    key = repr((GGUF_FOLDERS, str(file.resolve()), status.st_size, status.st_mtime_ns))
    return cache_folder() / "gguf" / hashlib.sha256(key.encode()).hexdigest()[:24]


def cache_folder() -> Path:
    """Return the folder of what is made of models once: $LORAFLEET_CACHE_DIR, else lorafleet/ in the user's cache.

    One that others may write is not used: see `own_folder`.
    """
    chosen = os.environ.get("LORAFLEET_CACHE_DIR")
    home = os.environ.get("XDG_CACHE_HOME")
    return own_folder(Path(chosen) if chosen else Path(home or Path.home() / ".cache") / "lorafleet")


def hold_folder(folder: Path) -> int:
    """Keep `prune_folders` from deleting a folder, until this process ends or closes the descriptor returned."""
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(held, fcntl.LOCK_SH)
    return held


def prune_folders(root: Path, num_kept: int) -> None:
    """Delete model folders in `root`, the least recently touched first, until `num_kept` are left; no held one.

    What is still being made there has no config, and stays.
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
    """Return the folder of `model`, a path or a Hub id (fetched if needed). Raises BadRequest when it is neither.

    That of a GGUF file is the one which `lorafleet fetch` and `lorafleet up` make.
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
    # Imported here, because it takes a tenth of a second of every service's start, and most models are on the machine.

    return Path(snapshot_download(model, allow_patterns=list(patterns)))


def is_here(model: str) -> bool:
    """Return whether a worker can load a model, an absolute path or a Hub id, without fetching it first. Blocks.

    What cannot be looked at, such as a folder of another user, is not here.
    """
    path = Path(model)
    try:
        if path.is_absolute():
            return (path / "config.json").is_file() or (is_gguf(path) and (gguf_folder(path) / "config.json").is_file())
        from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]

        folder = Path(snapshot_download(model, local_files_only=True))
        return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))  # gateways fetch the others
    except (OSError, ValueError):  # nothing of it is here; it is no Hub id
        return False


def check_text_files(model: str) -> None:
    """Raise BadRequest unless what a gateway reads of `model` is regular files within the limits. Blocks.

    Of the Hub it asks the sizes before anything is fetched. Raises OSError where the Hub does not answer.
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

    So it has, too, where its files are not: at a store.
    """
    if name:
        return name
    path = Path(model).expanduser()
    is_folder = os.path.isdir(path)  # `Path.is_dir` raises for a name too long, and in another user's folder
    if is_gguf(path) or (path.is_absolute() and not is_folder):
        return path.name.removesuffix(".gguf")
    return path.resolve().name if is_folder else model


def settings_of_further(settings: Settings, model: str, name: str) -> Settings:
    """Return the settings with which a base is served that is not that of `model`: the draft model is not its own."""
    return settings.model_copy(update={"model": model, "served_name": name, "draft_model": ""})


def base_settings(settings: Settings) -> dict[str, Settings]:
    """Return for each base of a fleet the settings of its own services, by its name: the default one first.

    Raises BadRequest for two bases of one name.
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
    """Return the same of the bases that a worker may serve: its `more_models` may repeat its own `model`."""
    own = served_name(settings.model, settings.served_name)
    others = [model for model in names_of(settings.more_models) if served_name(model, "") != own]
    return base_settings(settings.model_copy(update={"more_models": ",".join(others)}))
