"""Named fleets, so that commands need no URL: `config.toml` in the user's configuration folder.

profile = "prod"            # used without --profile

[prod]
url = "https://fleet.example"
key_file = "~/.keys/prod"   # or key = "...", if no other user may read this file
"""

from __future__ import annotations

import os
import stat
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.wire.errors import BadRequest

FIELDS = ("url", "key", "key_file")


@dataclass(frozen=True, slots=True)
class Profile:
    """URL and API key of a fleet."""

    url: str = ""
    key: str = ""


def config_file() -> Path:
    """Return the path of the file with the profiles."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "lorafleet" / "config.toml"


def load_profile(name: str) -> Profile:
    """Return a profile; "": the file's default one, or an empty profile if there is none.

    Raises BadRequest, which names the file and its error.
    """
    file = config_file()
    try:
        parsed = tomllib.loads(file.read_text())
    except FileNotFoundError:
        if name:
            raise BadRequest(f"--profile: no such file: {file}") from None
        return Profile()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadRequest(f"{file}: {error}") from error
    profiles = {key: value for key, value in parsed.items() if isinstance(value, dict)}
    for key, value in parsed.items():
        if key not in profiles and not (key == "profile" and isinstance(value, str)):
            raise BadRequest(f"{file}: {key}: expected [NAME] tables and profile = NAME")
    chosen = name or parsed.get("profile", "")
    if not chosen:
        return Profile()
    if chosen not in profiles:
        raise BadRequest(f"{file}: there is no profile {chosen!r:.100}; it has {', '.join(profiles) or 'none'}")
    return _profile(profiles[chosen], f"{file}: [{chosen}]", file)


def _profile(values: dict[str, Any], place: str, file: Path) -> Profile:
    for key, value in values.items():
        if key not in FIELDS or not isinstance(value, str):
            raise BadRequest(f"{place}: {key}: a profile has {', '.join(FIELDS)}, each a string")
    key = values.get("key", "")
    if key and stat.S_IMODE(file.stat().st_mode) & 0o077:
        raise BadRequest(f"{place}: key: other users can read this file: chmod 600 {file}, or use key_file")
    if "key_file" in values:
        key = read_key(Path(values["key_file"]).expanduser(), f"{place}: key_file")
    return Profile(values.get("url", ""), key)


def read_key(path: Path, place: str) -> str:
    """Return the key in a file. place: where the file was named, for the error. Raises BadRequest."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{place}: cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
