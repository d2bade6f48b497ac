"""The command line: examples that parse in every help, suggestions for typos, and a short help for many flags."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator

import pytest

from lorafleet.__main__ import COMMANDS, main, parser_of
from lorafleet.shared.examples import EXAMPLES
from lorafleet.shared.parser import Parser, parse


def parsers(parser: argparse.ArgumentParser) -> Iterator[Parser]:
    """Yield a parser and, recursively, those of its subcommands."""
    assert isinstance(parser, Parser)
    yield parser
    for action in parser._actions:  # argparse has no other way to ask
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers(below)


WHOLE = parser_of(COMMANDS)


def test_every_help_has_examples_that_parse(subtests: pytest.Subtests) -> None:
    names = {parser.prog for parser in parsers(WHOLE)}
    assert EXAMPLES.keys() == names
    for name, lines in EXAMPLES.items():
        for line in lines:
            with subtests.test(line=line):
                found = re.search(r"lorafleet [^)\"|#]*", line)
                assert found is not None
                words = shlex.split(found[0])[1:]
                assert parse(WHOLE, words).parser.prog.startswith(name)
    shown = next(parser for parser in parsers(WHOLE) if parser.prog == "lorafleet adapters add").format_help()
    assert f"examples:\n  {EXAMPLES['lorafleet adapters add'][0]}\n" in shown


def test_every_argument_has_a_help_text() -> None:
    bare = [
        f"{parser.prog} {action.dest}"
        for parser in parsers(WHOLE)
        for action in parser._actions
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    ]
    assert bare == []


def test_texts_in_a_help_fit_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples stay on one line, to be copied."""
    monkeypatch.setenv("COLUMNS", "80")
    lines = [line for parser in parsers(WHOLE) for line in parser.format_whole_help().splitlines()]
    assert [one for one in lines if len(one) > 80 and len(one.split()) > 3 and not one.startswith("  lorafleet ")] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("adaptors", "unknown command 'adaptors'; did you mean adapters?"),
        ("adapters lst", "unknown command 'lst'; did you mean list?"),
        ("adapters list --tennant x", "adapters list: error: unknown argument --tennant; did you mean --tenant?"),
        ("up x --adaptrs=y", "lorafleet up: error: unknown argument --adaptrs; did you mean --adapters?"),
        ("completion fsh", "'fsh' is not one of bash, zsh, fish; did you mean fish?"),
        ("zzzz", "unknown command 'zzzz' (see lorafleet --help)"),
        ("--verison", "lorafleet: error: unknown argument --verison; did you mean --version?"),
        ("chat", "the following arguments are required: MODEL (see"),
        ("serve", "required: gateway|scheduler|worker|store (see"),
        ("profile", "required: MODEL (see"),
        ("audit --limit 0", "argument --limit: 0 is less than 1 (see"),
        ("audit --limit 9223372036854775808", "argument --limit: 9223372036854775808 is too large (see"),
        ("audit --limit x", "argument --limit: 'x' is not a whole number (see"),
        ("bench --requests 0", "argument --requests: 0 is less than 1 (see"),
        ("adapters convert a b --rank 8", "argument --rank: '8' is not auto, the only choice (see"),
        ("keys create --tenant a --scopes infer,adaptors", "not one of infer, adapters, admin; did you mean"),
        ("usage --by tenants", "'tenants' is not one of tenant, model, batch, adapter, base_model; did you"),
        ("chat a --seed 1 b --nothing", "lorafleet chat: error: unknown argument --nothing (see"),
        ("chat a --seed x b", "argument --seed: invalid int value: 'x' (see"),
        ("keys create --tenant a --scopes ,", "argument --scopes: give at least one of infer, adapters, admin (see"),
    ],
)  # fmt: skip
def test_an_unknown_word_gets_a_suggestion(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "name", "values"),
    [
        ("chat a --seed 1 b c --json", "message", ["b", "c"]),
        ("chat a b --seed 1 c", "message", ["b", "c"]),
        ("up a --port 9 b", "models", ["a", "b"]),
        ("logs -n 2 gateway store", "services", ["gateway", "store"]),
        ("dlq retry 1-0 --json 2-0", "letters", ["1-0", "2-0"]),
    ],
)
def test_flags_may_stand_between_words(words: str, name: str, values: list[str]) -> None:
    assert getattr(parse(WHOLE, words.split()), name) == values


def test_the_command_alone_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown
    assert _printed(["help"], capsys) == shown
    assert _printed(["help", "chat"], capsys) == _printed(["chat", "--help"], capsys)


def test_a_benchmark_without_a_server_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "http://127.0.0.1:9"]) == 2
    said = "cannot reach the server at http://127.0.0.1:9: Connection refused"
    assert said in " ".join(capsys.readouterr().out.split())


def test_ls_is_list_everywhere() -> None:
    for name in ("adapters", "bases", "workers", "jobs", "batch", "keys", "dlq"):
        assert parse(WHOLE, [name, "ls"]).parser.prog == f"lorafleet {name} list"


def test_the_help_of_up_is_short_and_that_of_all_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    short, whole = (_printed(["up", flag], capsys) for flag in ("--help", "--help-all"))
    assert 15 <= len(re.findall(r"^  --", short, re.MULTILINE)) <= 24
    assert len(re.findall(r"^  --", whole, re.MULTILINE)) > 100
    assert "--max-queued" in whole
    assert "--max-queued" not in short
    assert {"--reads-per-s X", "--grace-s SECONDS", "--max-body-bytes BYTES"} <= set(re.findall(r"--\S+ [A-Z]+", whole))


def _printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    return capsys.readouterr().out
