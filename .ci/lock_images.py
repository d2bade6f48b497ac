"""Write the locks of the images: every package with its version and the hashes of its files on the package index.

    build/supply/bin/python .ci/lock_images.py        # `make lock-images`

Versions are those of requirements-dev.lock, with which the tests ran. Torch and the dependencies of its builds (CUDA's
libraries, Triton) are left out: the CPU and the CUDA build share a version but not their bytes, and the choice is made
when an image is built. The Dockerfile then installs torch in that version, without a hash.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

IMAGES = {"control": ("tracing",), "worker": ("worker", "demo", "tracing")}
"""Image -> the extras of pyproject.toml installed in it."""

MACHINES = ("x86_64", "aarch64")
"""Architectures that each lock supports: it has the hashes of the files for all platforms."""

BY_TORCH = ("torch", "triton", "nvidia-", "cuda-")
HEAD = """\
# What the image `{image}` installs, with the hashes of the files on the package index; made by `make lock-images`.
# Torch is not here, see .ci/lock_images.py.
"""


def resolved(requirements: list[str], machine: str) -> str:
    """Return the packages that uv resolves for the images' Python on an architecture. Raises CalledProcessError."""
    command = [
        str(Path(sys.executable).with_name("uv")), "pip", "compile", "--quiet", "--system-certs", "--no-header",
        "--no-annotate", "--generate-hashes", "--python-version", "3.11",
        "--python-platform", f"{machine}-manylinux_2_28",
        "--constraints", "requirements-dev.lock", "-",
    ]  # fmt: skip
    return subprocess.run(command, input="\n".join(requirements), text=True, check=True, capture_output=True).stdout


def without_torch(lock: str) -> str:
    """Return a lock without torch's packages. A package is its first line and the lines of its hashes."""
    packages = re.split(r"^(?=\S)", lock, flags=re.MULTILINE)
    return "".join(package for package in packages if not package.startswith(BY_TORCH))


def main() -> int:
    """Write the locks; return the exit code."""
    pyproject = tomllib.loads(Path("pyproject.toml").read_text())
    project, backend = pyproject["project"], pyproject["build-system"]["requires"]
    for image, extras in IMAGES.items():
        more = [line for extra in extras for line in project["optional-dependencies"][extra]]
        path = Path(f"requirements-{image}.lock")
        wanted = [*project["dependencies"], *more, *backend]
        try:
            lock, *others = (without_torch(resolved(wanted, machine)) for machine in MACHINES)
        except subprocess.CalledProcessError as error:
            print(error.stderr, file=sys.stderr)
            return 1
        if any(other != lock for other in others):
            print(f"{path}: what is installed differs between {' and '.join(MACHINES)}", file=sys.stderr)
            return 1
        path.write_text(HEAD.format(image=image) + lock)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
