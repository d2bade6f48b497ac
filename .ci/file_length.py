"""Fail if a source file has more than 500 lines: it should be split."""

import subprocess
import sys
from pathlib import Path

MAX_LINES = 500
SUFFIXES = {".py", ".lua", ".cpp", ".h", ".hpp", ".cu", ".sh"}


def main() -> int:
    """Check all files that git tracks or would track; return the exit code."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], capture_output=True, text=True, check=True
    )
    files = [path for path in map(Path, listed.stdout.splitlines()) if path.suffix in SUFFIXES and path.is_file()]
    lengths = {path: len(path.read_bytes().splitlines()) for path in files}
    long = {path: length for path, length in lengths.items() if length > MAX_LINES}
    for path, length in sorted(long.items()):
        print(f"{path}: {length} lines; the limit is {MAX_LINES}", file=sys.stderr)
    print(f"{len(files)} source files, the longest has {max(lengths.values(), default=0)} lines")
    return 1 if long else 0


if __name__ == "__main__":
    sys.exit(main())
