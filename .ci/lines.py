"""Counts lines of code, without blank lines, comments and docstrings, and in brackets all lines: docs/structure.md.

python .ci/lines.py [FOLDER...]
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

FOLDERS = (
    "gateway", "gpu_worker", "scheduler", "adapter_store", "protocol", "peft_adapters", "kernels", "lorafleet",
    "tests", "chaos", "benchmarks",
)  # fmt: skip
SILENT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip


def lines_of_python(text: str) -> int:
    """Return the number of lines that hold code. An expression that is only a string counts as a docstring."""
    strings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            strings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SILENT:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - strings)


def lines_of_lua(text: str) -> int:
    """Return the number of lines that are neither blank nor a comment."""
    return sum(bool(line.strip()) and not line.strip().startswith("--") for line in text.splitlines())


def main() -> None:
    """Print a line per folder and language."""
    for folder in sys.argv[1:] or FOLDERS:
        for suffix, count in ((".py", lines_of_python), (".lua", lines_of_lua)):
            texts = [path.read_text() for path in sorted(Path(folder).rglob(f"*{suffix}"))]
            if texts:
                print(
                    f"{folder} *{suffix}: {sum(map(count, texts)):,} ({sum(text.count(chr(10)) for text in texts):,})"
                )


if __name__ == "__main__":
    main()
