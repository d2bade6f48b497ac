"""Download the console's third-party files, each verified by its hash, and write their licenses.

    python .ci/console_assets.py            # writes gateway/console/static/vendor and that of /docs; no change if
                                            # the files are there
    python .ci/console_assets.py FOLDER     # writes axe-core to FOLDER; the console's tests check accessibility with it

It needs npm, which only downloads archives: no package is installed, and nothing is built.
"""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

CONSOLE = Path(__file__).parents[1] / "gateway" / "console"
VENDOR = CONSOLE / "static" / "vendor"
VENDOR_OF_DOCS = CONSOLE / "docs" / "vendor"
LICENCES = "LICENCES.txt"


@dataclass(frozen=True, slots=True)
class Package:
    """A release of a package, and the files to take from it."""

    name: str
    version: str
    licence: str
    sha512: str  # of the archive, base64, from npm's registry
    files: tuple[tuple[str, str, str], ...] = ()  # (path in the archive, path here, sha256)
    remark: str = ""


PACKAGES = (
    Package(
        "htm", "3.1.1", "Apache-2.0",
        "983Vyg8NwUE7JkZ6NmOqpCZ+sh1bKv2iYTlUkzlWmA5JD2acKoxd4KVxbMmxX/85mtfdnDmTFoNKcg5DGAvxNQ==",
        (("preact/standalone.mjs", "preact-htm.js",
          "72284e8e9079c87817145df1110f74e8a2aa040b2fc384922e18dfcb46fc1fd7"),),
        "the console in the browser; the file has Preact in it",
    ),
    Package(
        "preact", "11.2.0", "MIT",
        "/HfHI/7N84e6GrWBJ3J280z3mLaRJiDcSvj/A+y/4AbLnND/1UlGHe1sR6oYuTGwId0nP7dqDU9OnLxMPZ7xBg==",
        remark="its licence; the code is in htm's file",
    ),
    Package(
        "uplot", "1.6.32", "MIT",
        "KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXImkbLgkMy+jabjLgSLMasNuGGzQm/ep3tOkyTxpiQIw==",
        (("dist/uPlot.iife.min.js", "uplot.js", "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"),
         ("dist/uPlot.min.css", "uplot.css", "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04")),
        "the console's charts",
    ),
)  # fmt: skip
"""The packages of the console."""

PACKAGES_OF_DOCS = (
    Package(
        "swagger-ui-dist", "5.35.0", "Apache-2.0",
        "U06rpMtW9V3XPGOBeamTUSr0Z09jMX4IJuANpE/EZbAhw0G8CgwrzU4YmXkn/h0wCDNsXdGarTNNHC3sU8yVUQ==",
        (("swagger-ui-bundle.js", "swagger-ui-bundle.js",
          "e6a898692f2d768e807c3ba4626068a69a2c5dd960dd6c76f3e4d3a3de180af2"),
         ("swagger-ui.css", "swagger-ui.css", "5ed08757e53da3e026d6cbecc61fe5d43585c9560b302d534ad56692519a273d")),
        "the page at /docs",
    ),
)  # fmt: skip
"""The packages of `/docs`."""

AXE = Package(
    "axe-core", "4.14.1", "MPL-2.0",
    "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ==",
    (("axe.min.js", "axe.min.js", "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"),),
    "tests of the console only; fetched for them, not part of this repository",
)  # fmt: skip


def fetched(package: Package) -> dict[str, bytes]:
    """Return the files of a package's archive by path. Raises ValueError if the archive's hash differs."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        name = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.split()[-1]
        raw = (Path(folder) / name).read_bytes()
        if base64.b64encode(hashlib.sha512(raw).digest()).decode() != package.sha512:
            raise ValueError(f"{package.name} {package.version} is not what it was")
        with tarfile.open(Path(folder) / name) as archive:
            found: dict[str, bytes] = {}
            for member in archive.getmembers():
                file = archive.extractfile(member) if member.isfile() else None
                if file is not None:
                    found[member.name.removeprefix("package/")] = file.read()
            return found


def write(packages: tuple[Package, ...], folder: Path) -> None:
    """Write the selected files of packages into a folder, and all their licenses into one file."""
    folder.mkdir(parents=True, exist_ok=True)
    texts: list[str] = []
    for package in packages:
        files = fetched(package)
        for path, name, sha256 in package.files:
            if hashlib.sha256(files[path]).hexdigest() != sha256:
                raise ValueError(f"{package.name}: {path} is not what it was")
            (folder / name).write_bytes(files[path])
        names = ", ".join(name for _, name, _ in package.files) or "in preact-htm.js"
        head = f"{package.name} {package.version} ({names}), {package.licence}"
        texts.append(f"{head}\n{'=' * len(head)}\n\n{files['LICENSE'].decode().strip()}\n")
    (folder / LICENCES).write_text("\n\n".join(texts))


def main(args: list[str]) -> None:
    """Write the files of the console, or axe-core to a folder."""
    if args:
        write((AXE,), Path(args[0]))
    else:
        write(PACKAGES, VENDOR)
        write(PACKAGES_OF_DOCS, VENDOR_OF_DOCS)


if __name__ == "__main__":
    main(sys.argv[1:])
