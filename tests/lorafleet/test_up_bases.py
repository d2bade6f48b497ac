"""`lorafleet up` with several base models: early refusals, and the settings passed to each worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafleet.__main__ import main
from lorafleet.launcher.fleet import service_specs
from lorafleet.up import prepare
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest


def model(folder: Path, *, tokenizer: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}")
    return folder


def plan(tmp_path: Path, *models: Path, **more: Any) -> Settings:
    first, *further = map(str, models)
    settings = Settings(model=first, more_models=",".join(further), data=tmp_path / "data", port=0, **more)
    return prepare(settings).settings


@pytest.mark.parametrize(("workers", "begun"), [(0, ["first", "two", "three"]), (1, ["first"]), (4, [0, 1, 2, 0])])
def test_workers_begin_with_base_after_base_and_share_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, begun: list[Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [model(tmp_path / name) for name in ("one", "two", "three")]
    given = [Path(path.name) for path in paths]
    settings = plan(tmp_path, *given, served_name="first", workers=workers, device="cpu")
    specs = {spec.name: spec.environment for spec in service_specs(settings, tmp_path, cores=8)}
    names = ["first", "two", "three"]
    begun = [names[base] if isinstance(base, int) else base for base in begun]
    assert list(specs) == ["store", "scheduler", "gateway", *(f"worker-{i}" for i in range(len(begun)))]
    for i, base in enumerate(begun):
        found = [specs[f"worker-{i}"][f"LORAFLEET_{name}"] for name in ("BASE", "WORKERS", "THREADS", "SERVED_NAME")]
        assert found == [base, str(len(begun)), str(8 // len(begun)), "first"]
    for environment in specs.values():  # each worker knows all bases, because it may be moved to any
        assert environment["LORAFLEET_MODEL"] == str(paths[0])
        assert environment["LORAFLEET_MORE_MODELS"] == f"{paths[1]},{paths[2]}"


def test_one_base_is_given_what_it_ever_was(tmp_path: Path) -> None:
    settings = plan(tmp_path, model(tmp_path / "one"), workers=2, device="cpu")
    specs = {spec.name: spec.environment for spec in service_specs(settings, tmp_path, cores=8)}
    assert list(specs) == ["store", "scheduler", "gateway", "worker-0", "worker-1"]
    for name in ("gateway", "worker-0", "worker-1"):
        found = [specs[name][f"LORAFLEET_{one}"] for one in ("MODEL", "SERVED_NAME", "WORKERS", "MORE_MODELS")]
        assert found == [str(tmp_path / "one"), "one", "2", ""]


def test_the_draft_model_is_given_to_services_as_a_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, small = model(tmp_path / "one"), model(tmp_path / "small")
    assert plan(tmp_path, one, draft_model="small").draft_model == str(small)
    assert plan(tmp_path, one).draft_model == ""
    settings = Settings(model=str(one), draft_model="small", data=tmp_path / "data", port=0)
    assert [other.resolve() for other in prepare(settings).others] == [small], (
        "its folder is held, so that it is there when a worker restarts"
    )
    with pytest.raises(BadRequest, match="neither a folder nor a Hub id"):
        plan(tmp_path, one, draft_model=str(tmp_path / "missing"))


def test_bases_that_cannot_be_asked_are_refused_before_anything_starts(tmp_path: Path) -> None:
    one, mute = model(tmp_path / "one"), model(tmp_path / "mute", tokenizer=False)
    with pytest.raises(BadRequest, match=r"mute has no tokenizer.json: a base without a tokenizer cannot be served"):
        plan(tmp_path, one, mute)
    with pytest.raises(BadRequest, match="two base models of this fleet have the name one"):
        plan(tmp_path, one, model(tmp_path / "other" / "one"))
    with pytest.raises(BadRequest, match="neither a folder nor a Hub id"):
        plan(tmp_path, one, tmp_path / "missing")


def test_a_comma_does_not_make_two_models_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "a", "b,c"]) == 2
    assert "b,c has a comma" in capsys.readouterr().err
