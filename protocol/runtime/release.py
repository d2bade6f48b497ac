"""The version of this program, which services report to each other."""

from __future__ import annotations

from importlib.metadata import version

RELEASE = version("lorafleet")
