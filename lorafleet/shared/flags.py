"""Settings as command-line flags, one per field. `Settings` checks the values; an error is one line."""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import ValidationError
from pydantic_settings import SettingsError

from lorafleet.launcher import lifeline
from lorafleet.launcher.records import URL_VARIABLE
from lorafleet.shared.api import PROFILE_VARIABLE
from lorafleet.shared.parser import Parser
from protocol.runtime.again import SWAP_VARIABLE
from protocol.runtime.common_settings import CONFIG_VARIABLE
from protocol.runtime.redaction import redact
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest

PREFIX = str(Settings.model_config.get("env_prefix"))
OTHER_VARIABLES = {
    CONFIG_VARIABLE,
    lifeline.VARIABLE,
    "LORAFLEET_CACHE_DIR",
    URL_VARIABLE,
    PROFILE_VARIABLE,
    SWAP_VARIABLE,
}
PRECEDENCE = f"""\
Each setting is also an environment variable {PREFIX}NAME, and a line
NAME = VALUE in the --config file. Flags override variables, and variables
override the file."""
NO_FLAG = ("secret",)
"""Settings without a flag, because every user of this machine could read a flag in the process list."""
SECTIONS = {
    "redis_url": "every service",
    "host": "the gateway",
    "beat_timeout_s": "the scheduler",
    "workers": "the workers",
    "adapters": "the adapter store",
}
"""First field of each section of `Settings`, in order -> the services that read the section."""

_UNITS = {"_s": "SECONDS", "_bytes": "BYTES", "_tokens": "TOKENS"}


def sections() -> dict[str, list[str]]:
    """Return the names of all settings in the order of their declaration, by section."""
    found: dict[str, list[str]] = {}
    section = ""
    for name in Settings.model_fields:
        section = SECTIONS.get(name, section)
        found.setdefault(section, []).append(name)
    return found


def add_settings(parser: Parser, first: Sequence[str] = (), skip: Sequence[str] = ()) -> None:
    """Declare `--config` and a flag for every field of `Settings` that is not in `skip`.

    `--help` shows the flags in `first`; `--help-all` shows the others too, grouped by the service that reads them.
    """
    parser.epilog = PRECEDENCE
    parser.add_argument("--config", metavar="FILE.toml", help=f"TOML file of settings, also ${CONFIG_VARIABLE}")
    for name in first:
        _add_flag(parser, name)
    if len(first) + len(skip) < len(Settings.model_fields):
        parser.add_help_all()
    for section, names in sections().items():
        rest = [name for name in names if name not in first and name not in skip]
        if rest:
            group = parser.add_argument_group(f"settings of {section}")
            parser.long_groups.append(group)
            for name in rest:
                _add_flag(group, name)


def load_settings(args: argparse.Namespace, **given: Any) -> Settings:
    """Return the settings from flags, variables and the TOML file; `given` values count as flags.

    `REDIS_URL` is used if `LORAFLEET_REDIS_URL` is not set. Raises BadRequest, which names each wrong value and its
    origin.
    """
    if args.config:
        os.environ[CONFIG_VARIABLE] = args.config
    config = os.environ.get(CONFIG_VARIABLE)
    if config and not Path(config).is_file():
        raise BadRequest(f"--config: no such file: {config}")
    if url := os.environ.get("REDIS_URL"):
        os.environ.setdefault(f"{PREFIX}REDIS_URL", url)
    _refuse_unknown_variables()
    flags = {name: value for name, value in vars(args).items() if name in Settings.model_fields} | given
    if _has_password(args, "redis_url"):
        raise BadRequest(
            "--redis-url: other users of this machine could read the password; use --redis-password-file, or give the"
            " URL as REDIS_URL"
        )
    if _has_password(args, "prometheus_url"):
        raise BadRequest(
            "--prometheus-url: other users of this machine could read the password; give the URL as"
            f" {PREFIX}PROMETHEUS_URL"
        )
    try:
        return Settings(**flags)
    except tomllib.TOMLDecodeError as error:
        raise BadRequest(f"{config}: {error}") from error
    except SettingsError as error:
        raise BadRequest(str(error)) from error
    except ValidationError as error:
        problems = [
            f"{_origin(str(problem['loc'][0]), flags, config)}: {_wrong(problem)}" + _given(problem)
            for problem in error.errors()
        ]
        raise BadRequest("; ".join(problems)) from error


def _has_password(args: argparse.Namespace, name: str) -> bool:
    """Return whether the URL in a flag has a password. Raises BadRequest for an invalid URL."""
    url = str(vars(args).get(name, ""))
    try:
        return bool(urlsplit(url).password)
    except ValueError as error:
        raise BadRequest(f"--{name.replace('_', '-')}: {url!r:.100} is not a URL: {error}") from error


def _wrong(problem: Any) -> str:
    """Return what is wrong with a value: pydantic's message, or the setting's description if a pattern fails."""
    if problem["type"] == "string_pattern_mismatch":
        return f"expected: {str(Settings.model_fields[problem['loc'][0]].description).partition(';')[0]}"
    return problem["msg"].partition(", unable to parse")[0].replace("Input should be", "must be")


def _given(problem: Any) -> str:
    """Return the end of a message about a wrong value: the value itself, unless it is a secret."""
    return "" if problem["loc"][0] in NO_FLAG else f", not {redact(repr(problem['input']))}"


def _refuse_unknown_variables() -> None:
    """Raise BadRequest for a misspelled variable, which would otherwise be ignored silently."""
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | OTHER_VARIABLES
    for name in sorted(os.environ.keys() - known):
        if name.startswith(PREFIX):
            close = get_close_matches(name, known, n=1)
            raise BadRequest(f"{name}: no such setting" + (f"; did you mean {close[0]}?" if close else ""))


def _add_flag(group: argparse._ActionsContainer, name: str) -> None:
    if name in NO_FLAG:
        return
    field = Settings.model_fields[name]
    flag = "--" + name.replace("_", "-")
    text = (field.description or name.replace("_", " ")).replace("%", "%%")
    default = "" if field.default in (None, "", False) else f" (default: {field.default})"
    if "default" in text or (field.default == 0 and text.find("0:") >= 0):
        default = ""
    common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text + default}
    if field.annotation in (bool, bool | None):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
    else:
        group.add_argument(flag, metavar=_metavar(name, field.annotation), **common)


def _metavar(name: str, annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    if get_origin(annotation) is UnionType:
        annotation = get_args(annotation)[0]
    if annotation is Path:
        return "FILE" if name.endswith("_file") else "DIR"
    unit = next((unit for suffix, unit in _UNITS.items() if name.endswith(suffix) and "_per_" not in name), None)
    return unit or {int: "N", float: "X"}.get(annotation, name.rsplit("_", 1)[-1].upper())


def _origin(name: str, flags: dict[str, Any], config: str | None) -> str:
    """Return where a value was given: a flag, a variable or the file."""
    if name in flags:
        return "--" + name.replace("_", "-")
    variable = f"{PREFIX}{name.upper()}"
    return variable if variable in os.environ else f"{config}: {name}"
