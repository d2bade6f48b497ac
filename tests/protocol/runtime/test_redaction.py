"""No secret appears in a log line or an error message."""

from __future__ import annotations

import json
import logging
import string
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.runtime.redaction import HIDDEN, redact
from protocol.runtime.service import JsonLines, Redacting, set_up_logging

LETTERS = string.ascii_letters + string.digits
URL_PASSWORDS = st.text(LETTERS + "-._~!$&()*+,;=:/@%#?", min_size=4, max_size=80)
TOKENS = st.text(LETTERS + "-._", min_size=20, max_size=80)
BORDERS = st.sampled_from(["", " ", "'", '"', "\n", "(", "<", "error: ", "→ "])

SHAPES: dict[str, Callable[[str], str]] = {
    "bearer": lambda secret: f"Authorization: Bearer {secret}",
    "header": lambda secret: f"x-api-key: {secret}",
    "hub": lambda secret: "hf_" + "".join(letter for letter in secret if letter.isalnum()),
    "key": lambda secret: "sk-lf-" + secret.replace(".", "_"),
    "variable": lambda secret: f"LORAFLEET_SECRET={secret}",
    "aws": lambda secret: f"aws_secret_access_key = {secret}",
    "session": lambda secret: f"AWS_SESSION_TOKEN={secret}",
    "json": lambda secret: json.dumps({"hf_token": secret}),
    "dict": lambda secret: repr({"password": secret}),
    "query": lambda secret: f"https://bucket/key?X-Amz-Signature={secret}&x=1",
    "nested": lambda secret: json.dumps(json.dumps({"secret": secret})),
}


@given(URL_PASSWORDS, st.sampled_from(["redis", "rediss", "unix", "https", "s3+x"]), BORDERS, BORDERS)
def test_a_password_in_a_url_is_hidden(password: str, scheme: str, before: str, after: str) -> None:
    text = redact(f"{before}{scheme}://user:{password}@host:6379/0{after} and more")
    assert text == f"{before}{scheme}://user:{HIDDEN}@host:6379/0{after} and more"


@pytest.mark.parametrize("shape", SHAPES)
@given(secret=TOKENS, before=BORDERS, after=BORDERS.filter(lambda text: text != "→ "))
def test_a_token_is_hidden_in_every_shape(shape: str, secret: str, before: str, after: str) -> None:
    written = SHAPES[shape](secret)
    shown = redact(f"{before} {written}{after}")
    assert HIDDEN in shown
    assert secret not in shown
    assert not [secret[i : i + 12] for i in range(len(secret) - 11) if secret[i : i + 12] in shown]


def test_an_aws_key_id_is_hidden() -> None:
    assert "IOSFODNN7EXAMPLE" not in redact("the key AKIAIOSFODNN7EXAMPLE is not allowed")


@pytest.mark.parametrize(
    "text",
    [
        "worker-0 was killed by SIGKILL; restarting it in 0.5 s",
        "redis://queue:6379/0 cannot be reached", "unix:///tmp/a/queue.sock", "unix://worker@/tmp/a/queue.sock",
        "12 tokens: 5 in the prompt", "max_new_tokens=12345678", "adapter 0123456789ab at hub:org/name@main",
    ],
)  # fmt: skip
def test_other_text_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("unit", ["a", "a-", "a://b:", "secret ", "bearer ", "secret=", "_", "hf_", "://:@"])
def test_a_long_line_costs_its_length(unit: str) -> None:
    """A quadratic cost would exceed the limit of every test, 30 s."""
    assert redact(unit * (400_000 // len(unit)))


@pytest.mark.parametrize("form", ["text", "json"])
def test_every_log_record_passes_the_filter(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger().handlers[:]
    try:
        set_up_logging("worker", "info", form)
        url = "redis://worker:hunter2hunter2@queue/0"
        logging.getLogger("a").warning("cannot reach %s with %s", url, "Bearer abcdefghijkl")
        try:
            raise ConnectionError(f"no answer from {url}")
        except ConnectionError:
            logging.getLogger("a").exception("lost")
    finally:
        logging.getLogger().handlers[:] = before
    shown = capsys.readouterr().err
    assert "hunter2" not in shown
    assert "abcdefghijkl" not in shown
    assert shown.count(HIDDEN) >= 3
    assert "ConnectionError" in shown


def test_the_json_form_is_still_json() -> None:
    record = logging.LogRecord("a", logging.ERROR, "f", 1, 'at %s "%s"', ("redis://u:p\\x@h\n", "x"), None)
    assert Redacting().filter(record)
    assert json.loads(JsonLines("worker").format(record))["message"] == f'at redis://u:{HIDDEN}@h\n "x"'
    assert sys.exc_info() == (None, None, None)
