"""Commands find the fleet by a flag, otherwise by a variable, otherwise by the profile."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafleet.shared.api import DEFAULT_URL, Api, add_flags
from lorafleet.shared.parser import Parser
from lorafleet.shared.profiles import load_profile
from protocol.wire.errors import BadRequest


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("LORAFLEET_URL", "OPENAI_API_KEY", "LORAFLEET_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "lorafleet" / "config.toml"
    file.parent.mkdir()
    return file


def api(*words: str) -> Api:
    parser = Parser()
    add_flags(parser)
    return Api(parser.parse_args(words))


def reached(*words: str) -> tuple[str, str]:
    with api(*words) as found:
        return found.url, found._client.headers.get("authorization", "").removeprefix("Bearer ")


def test_flags_win_over_variables_and_these_over_profiles(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reached() == (DEFAULT_URL, "")
    (config.parent / "prod.key").write_text("from-file\n")
    config.write_text(
        f'profile = "prod"\n[prod]\nurl = "https://prod/"\nkey_file = "{config.parent}/prod.key"\n'
        '[test]\nurl = "http://test"\n'
    )
    assert reached() == ("https://prod", "from-file")
    assert reached("--profile", "test") == ("http://test", "")
    monkeypatch.setenv("OPENAI_API_KEY", "from-variable")
    monkeypatch.setenv("LORAFLEET_URL", "http://variable")
    assert reached() == ("http://variable", "from-variable")
    assert reached("--url", "http://flag", "--key", "from-flag") == ("http://flag", "from-flag")
    (config.parent / "other.key").write_text("other")
    assert reached("--api-key-file", str(config.parent / "other.key"))[1] == "other"


def test_a_key_in_the_file_must_be_for_its_owner_alone(config: Path) -> None:
    config.write_text('[one]\nkey = "secret"\n')
    config.chmod(0o644)
    with pytest.raises(BadRequest, match="chmod 600"):
        load_profile("one")
    config.chmod(0o600)
    assert load_profile("one").key == "secret"


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("", "one", "no profile 'one'"),
        ("[one]\ncolour = 'red'\n", "one", "colour"),
        ("[one]\nurl = 3\n", "one", "url"),
        ("port = 3\n", "", "port"),
        ("profile = 'none'\n", "", "no profile 'none'"),
        ("[one\n", "one", "config.toml"),
        ("[one]\nkey_file = '/none/of/it'\n", "one", "key_file"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(config: Path, text: str, name: str, said: str) -> None:
    config.write_text(text)
    with pytest.raises(BadRequest, match=said):
        load_profile(name)


def test_a_profile_without_a_file_is_refused(config: Path) -> None:
    assert load_profile("").url == ""
    with pytest.raises(BadRequest, match="no such file"):
        load_profile("prod")
