"""Print the versions of everything in the development environment, as constraints for pip.

    .venv/bin/python .ci/lock.py > requirements-dev.lock        # `make lock`

It follows the requirements of pyproject.toml and of its extras through the installed packages, so it needs no network.
"""

import re
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

EXTRAS = ("worker", "demo", "bench", "dev")
NOT_LOCKED = ("triton", "nvidia", "pip", "setuptools")  # the first two depend on torch's build, the others on Python's
HEAD = """\
# The versions that the development environment was last tested with, as constraints for pip; the Makefile applies them.
# Made by `make lock` from the installed packages that pyproject.toml and its extras {extras} require.
# Versions are public ones, so torch's CPU and CUDA builds both match. Triton and NVIDIA's libraries depend on that
# build, pip and setuptools on the Python that made the environment: none of these is listed.
"""


def name_of(text: str) -> str:
    """Return the normalized name of a package."""
    return re.sub(r"[-_.]+", "-", text).lower()


def required(project: dict) -> dict[str, str]:
    """Return name -> version of every installed package that the project's environment needs.

    Raises PackageNotFoundError if one is not installed.
    """
    wanted = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    todo, seen, versions = [Requirement(line) for line in wanted], set(), {}
    while todo:
        requirement = todo.pop()
        name = name_of(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in seen or name.partition("-")[0] in NOT_LOCKED:
            continue
        seen.add(key)
        found = distribution(name)
        versions[name] = found.version.partition("+")[0]
        environments = [{"extra": extra} for extra in ("", *requirement.extras)]
        for line in found.requires or ():
            inner = Requirement(line)
            if inner.marker is None or any(inner.marker.evaluate(environment) for environment in environments):
                todo.append(inner)
    return versions


def main() -> int:
    """Print the lock file; return the exit code."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    lines = [f"{name}=={version}" for name, version in sorted(required(project).items())]
    print(HEAD.format(extras=", ".join(EXTRAS)) + "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
