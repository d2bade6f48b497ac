"""The version of this program, which services tell each other."""

from __future__ import annotations

from importlib.metadata import version

RELEASE = version("lorafleet")
