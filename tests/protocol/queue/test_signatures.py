"""Scripts are called with the arguments that they read: their heads, code and signatures agree by name."""

from __future__ import annotations

import re
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from protocol.queue import signatures as lua
from protocol.queue.script_call import Call, Group, shape_of
from protocol.queue.scripts import FOLDER

UNNAMED = {("submit", "fields")}
"""Groups that a script passes on unchanged, without reading any field."""

_ENTRY = re.compile(r"-- (KEYS|ARGV|    )  (\w+)(\.\.\.)? +(\S+(?: \| \S+)*)  (.*)")
_FIELD = re.compile(r"(\w+) \((str|bytes|int(?: \| str)?)\b")
_GROUPS = re.compile(r"for (\w+) = [^\n]*, (\d+) do\n +local ([\w, ]+) =\s+unpack\(ARGV, \1, \1 \+ (\d+)\)\n")


def _source(kind: type[Call]) -> str:
    return (FOLDER / f"{kind.script()}.lua").read_text()


def _head(source: str) -> tuple[dict[str, str], dict[str, str], dict[str, list[tuple[str, str]] | str]]:
    """Return the keys, arguments and lists in a script's head: types by name, and the fields of lists."""
    entries: list[list[str]] = []
    part = ""
    for line in source.partition("-- Reply: ")[0].splitlines():
        if found := _ENTRY.fullmatch(line):
            part = part if found[1].isspace() else found[1]
            entries.append([part, found[2], found[3] or "", found[4], found[5]])
        elif entries:
            entries[-1][-1] += " " + line.removeprefix("--").strip()
    keys = {name: kind for part, name, dots, kind, _ in entries if part == "KEYS"}
    args = {name: kind for part, name, dots, kind, _ in entries if part == "ARGV" and not dots}
    lists: dict[str, list[tuple[str, str]] | str] = {
        name: _FIELD.findall(text) if kind == "list" else kind for _, name, dots, kind, text in entries if dots
    }
    assert [*keys, *args, *lists] == [name for _, name, *_ in entries]  # in this order
    return keys, args, lists


def _type(hint: Any) -> str:
    return " | ".join(part.__name__ for part in get_args(hint) or (hint,))


def _fields(kind: type[Group]) -> list[tuple[str, str]]:
    return [(name, _type(hint)) for name, hint in get_type_hints(kind).items()]


def _bound(source: str, table: str) -> list[list[str]]:
    """Return the names to which a script unpacks a table, from the first name after the prefix on."""
    first = {"KEYS": "KEYS, 2", "ARGV": r"ARGV(?:, 1, (\d+))?"}[table]
    found = re.findall(rf"local ([\w,\s]+?) =\s+unpack\({first}\)\n", source)
    return [re.split(r",\s+", names if isinstance(names, str) else names[0]) for names in found]


@pytest.mark.parametrize("kind", lua.SIGNATURES, ids=lambda kind: kind.script())
def test_a_script_reads_what_its_signature_says(kind: type[Call]) -> None:
    source, hints = _source(kind), get_type_hints(kind, include_extras=True)
    keys, args, lists = _head(source)
    code = source.partition("-- Reply: ")[2]

    assert [*keys, *args, *lists] == list(hints)
    assert {name for name, hint in hints.items() if hint is lua.Key} == set(keys)
    assert {name: _type(hints[name]) for name in args} == args
    call: Call = kind(**{name: () if name in lists else name for name in hints})
    assert (call.laid_out(), shape_of(kind)[0]) == ([*keys, *args], len(keys))
    groups: dict[str, list[str]] = {}
    for name, said in lists.items():
        assert get_origin(hints[name]) is not None
        (item,) = get_args(hints[name])
        if isinstance(item, type) and issubclass(item, Group):
            assert _fields(item) == said
            groups[name] = list(item.__struct_fields__)
        else:
            assert _type(item) == said

    # Its code uses the same names in the same order, and reads none by index.
    assert _bound(code, "KEYS") == ([list(keys)] if keys else [])
    assert _bound(code, "ARGV") == ([list(args)] if args else [])
    assert re.findall(r"(?:KEYS|ARGV)\[[^\]]*\d[^\]]*\]", code) == []
    counts = re.findall(r"unpack\(ARGV, 1, (\d+)\)", code)
    assert counts == ([str(len(args))] if args and lists else [])
    assert re.findall(r"local first(?:, [\w, ]+)? = (\d+)", code) == ([str(len(args) + 1)] if lists else [])
    read: set[str] = set()
    for _, width, names, last in _GROUPS.findall(code):
        bound = names.split(", ")
        (match,) = {
            name for name, fields in groups.items()
            if len(fields) == int(width) == int(last) + 1
            and all(own in ("_", field) for own, field in zip(bound, fields, strict=False))
        }  # fmt: skip
        read.add(match)
    assert {(kind.script(), name) for name in groups} - {(kind.script(), name) for name in read} <= UNNAMED


@pytest.mark.parametrize("kind", lua.SIGNATURES, ids=lambda kind: kind.script())
def test_a_signature_says_what_its_script_does(kind: type[Call]) -> None:
    about = " ".join(line.removeprefix("-- ") for line in _source(kind).partition("\n--\n")[0].splitlines()[1:])
    assert about.startswith(str(kind.__doc__).removesuffix("."))


def test_every_script_has_a_signature() -> None:
    assert {kind.script() for kind in lua.SIGNATURES} == {path.stem for path in FOLDER.glob("*.lua")} - {"common"}


@pytest.mark.parametrize("kind", [*lua.SIGNATURES, *Group.__subclasses__()], ids=lambda kind: kind.__name__)
def test_what_a_script_is_called_with_is_named(kind: type[Call]) -> None:
    names = kind.__struct_fields__
    kind(**dict.fromkeys(names))
    with pytest.raises(TypeError, match="positional"):
        kind(*names)


def test_a_call_is_laid_out_in_the_order_of_its_fields() -> None:
    rows = [lua.AssignRow(placed=b"why", epoch=1, rid="a"), lua.AssignRow(rid="b", epoch=2, placed=b"")]
    call = lua.Assign(rows=rows, entry=b"e", wid="w", token="t", work="work", leader="leader")
    assert call.laid_out() == ["leader", "work", "t", "w", b"e", "a", 1, b"why", "b", 2, b""]
    call = lua.Requeue(rids=["a", "b"], max_attempts=3, name="n", has_died=1, wid="w")
    assert call.laid_out() == ["w", 1, "n", 3, "a", "b"]
