"""Settings as command-line flags: one flag per field, values checked by `Settings` itself, errors in one line."""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic_settings import SettingsError

from lorafleet import lifeline
from protocol.runtime.settings import CONFIG_VARIABLE, Settings
from protocol.wire.errors import BadRequest

PREFIX = str(Settings.model_config.get("env_prefix"))
OTHER_VARIABLES = {CONFIG_VARIABLE, lifeline.VARIABLE, "LORAFLEET_CACHE_DIR"}
_UNITS = {"_s": "SECONDS", "_bytes": "BYTES", "_tokens": "TOKENS"}


def add_settings(parser: argparse.ArgumentParser, first: Sequence[str] = (), skip: Sequence[str] = ()) -> None:
    """Declare `--config` and a flag for every field of `Settings` but those in `skip`; `first` leads the help."""
    parser.add_argument("--config", metavar="FILE.toml", help=f"settings as TOML, also as {CONFIG_VARIABLE}")
    rest = parser.add_argument_group(
        "more settings", f"each also as a variable {PREFIX}NAME or in the TOML file; a flag wins over both"
    )
    for name in first:
        _add_flag(parser, name)
    for name in Settings.model_fields:
        if name not in first and name not in skip:
            _add_flag(rest, name)


def load_settings(args: argparse.Namespace, **given: Any) -> Settings:
    """Return the settings of parsed flags over `LORAFLEET_*` over the TOML file; `given` counts as flags.

    `REDIS_URL` is read where `LORAFLEET_REDIS_URL` is not set. Raises BadRequest that names what is wrong, and where.
    """
    if args.config:
        os.environ[CONFIG_VARIABLE] = args.config
    config = os.environ.get(CONFIG_VARIABLE)
    if config and not Path(config).is_file():
        raise BadRequest(f"--config: there is no file {config}")
    if url := os.environ.get("REDIS_URL"):
        os.environ.setdefault(f"{PREFIX}REDIS_URL", url)
    _refuse_unknown_variables()
    flags = {name: value for name, value in vars(args).items() if name in Settings.model_fields} | given
    try:
        return Settings(**flags)
    except tomllib.TOMLDecodeError as error:
        raise BadRequest(f"{config}: {error}") from error
    except SettingsError as error:
        raise BadRequest(str(error)) from error
    except ValidationError as error:
        problems = [
            f"{_origin(str(problem['loc'][0]), flags, config)}: {problem['msg']}, not {problem['input']!r}"
            for problem in error.errors()
        ]
        raise BadRequest("; ".join(problems)) from error


def _refuse_unknown_variables() -> None:
    """A misspelt variable would otherwise be a setting that silently does nothing."""
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | OTHER_VARIABLES
    for name in sorted(os.environ.keys() - known):
        if name.startswith(PREFIX):
            close = get_close_matches(name, known, n=1)
            raise BadRequest(f"{name}: no such setting" + (f"; did you mean {close[0]}?" if close else ""))


def _add_flag(group: argparse._ActionsContainer, name: str) -> None:
    field = Settings.model_fields[name]
    flag = "--" + name.replace("_", "-")
    text = (field.description or name.replace("_", " ")).replace("%", "%%")
    default = "" if field.default in (None, "") else f" (default {field.default})"
    if "default" in text or (field.default == 0 and text.find("0:") >= 0):
        default = ""
    common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text + default}
    if field.annotation is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
    else:
        group.add_argument(flag, metavar=_metavar(name, field.annotation), **common)


def _metavar(name: str, annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    if get_origin(annotation) is UnionType:
        annotation = get_args(annotation)[0]
    if annotation is Path:
        return "DIR"
    unit = next((unit for suffix, unit in _UNITS.items() if name.endswith(suffix)), None)
    return unit or {int: "N", float: "X"}.get(annotation, name.rsplit("_", 1)[-1].upper())


def _origin(name: str, flags: dict[str, Any], config: str | None) -> str:
    """Say where a value came from, as the user wrote it."""
    if name in flags:
        return "--" + name.replace("_", "-")
    variable = f"{PREFIX}{name.upper()}"
    return variable if variable in os.environ else f"{config}: {name}"
