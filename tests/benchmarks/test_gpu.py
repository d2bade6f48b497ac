"""The GPU benchmark on a CPU with a tiny shape: tests the command that is run when a GPU is available for minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import churn, peer, steps, summary
from benchmarks.gpu.shapes import SHAPES, RandomAdapters, names_of
from gpu_worker.adapters.loader.fetch import digest_of

ROOT = Path(__file__).parents[2]
TINY, CPU = SHAPES["tiny"], torch.device("cpu")


@pytest.fixture(scope="module")
def sections() -> dict[str, dict[str, Any]]:
    return {name: command.run_section(name, "tiny", CPU, 60.0) for name in ("kernels", "steps", "churn")}


def test_every_mix_is_measured_in_every_way(sections: dict[str, dict[str, Any]]) -> None:
    cases = sections["steps"]["cases"]
    assert {(case["num_adapters"], case["overlap"]) for case in cases} == {
        (0, False),
        (0, True),
        (1, False),
        (4, False),
        (4, True),
    }
    assert all(case[key] > 0 for case in cases for key in ("decode_tok_s", "prefill_tok_s", "step_ms"))
    assert sections["steps"]["num_rounds"] == TINY.rounds


def test_churn_is_more_adapters_than_fit(sections: dict[str, dict[str, Any]]) -> None:
    found = sections["churn"]
    assert list(found["churn"]) == ["4 adapters", "8 adapters"]
    assert all(case["ttft_p50_ms"] <= case["ttft_p99_ms"] <= case["ttft_max_ms"] for case in found["churn"].values())
    assert found["isolation"]["beside cold"]["num_others"] > 0
    assert found["isolation"]["alone"]["num_others"] == 0


def test_kernels_stand_beside_their_floor(sections: dict[str, dict[str, Any]]) -> None:
    cases = sections["kernels"]["cases"]
    assert {case["kind"] for case in cases} == {"lora", "attention"}
    assert all(case["floor_us"] > 0 for case in cases)


def test_the_page_names_what_was_missed_and_what_was_not_run(sections: dict[str, dict[str, Any]]) -> None:
    about = summary.about(CPU, TINY.name)
    page = summary.page(about, {**sections, "peer": {"skipped": "vLLM is not installed here"}})
    assert "no figure of a GPU" in page
    assert page.count("not run |") == 2, "32 adapters are more than a tiny run has"
    assert "Not run: vLLM is not installed here." in page
    slow = {"steps": {"cases": [
        {"num_seqs": 32, "num_adapters": 0, "decode_tok_s": 100.0, "prefill_tok_s": 100.0},
        {"num_seqs": 32, "num_adapters": 32, "decode_tok_s": 91.0, "prefill_tok_s": 84.0},
    ]}}  # fmt: skip
    reached = {bar.what: bar.is_reached for bar in summary.bars(slow)}
    assert reached["32 mixed adapters ÷ base, decode tok/s"] is True
    assert reached["32 mixed adapters ÷ base, prefill tok/s"] is False
    assert reached["kernels at decode ÷ copy bandwidth, median"] is None
    failed = summary.page(about, {"kernels": {"failed": "RuntimeError: no kernel image", "output": []}})
    assert "Failed: RuntimeError: no kernel image" in failed


def test_a_section_that_fails_costs_no_other(tmp_path: Path) -> None:
    args = command.parse(["--device=cpu", "--shape=tiny", f"--out={tmp_path}"])
    assert command.run_apart("kernels", args, 1.0) == {"skipped": "no time was left"}
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho loading\necho 'RuntimeError: no kernel image'\nexit 1\n")
    python.chmod(0o755)
    failed = {"failed": "RuntimeError: no kernel image", "output": ["loading", "RuntimeError: no kernel image"]}
    assert command.run_apart("kernels", args, 60.0, str(python)) == failed
    python.write_text("#!/bin/sh\necho begun\nexec sleep 60\n")
    assert command.run_apart("kernels", args, 0.2, str(python), 0.0)["failed"] == "it took more than 0 s"


def test_the_proof_leaves_its_results_in_one_folder(tmp_path: Path) -> None:
    environment = {
        **os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), "DEVICE": "cpu", "SHAPE": "tiny",
        "ONLY": "kernels", "LORAFLEET_COMMIT": "abc",
    }  # fmt: skip
    done = subprocess.run(
        [ROOT / "deploy/gpu-proof.sh", "bench"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_bytes())
    assert report["commit"] == "abc"
    assert report["sections"]["kernels"]["cases"]
    assert (tmp_path / "bench.log").read_text().startswith("kernels:")
    assert "## Kernels beside the bandwidth floor" in (tmp_path / "gpu.md").read_text()


def test_adapters_of_one_rank_differ_and_fit_their_pool() -> None:
    adapters, names = RandomAdapters(TINY), names_of(6)
    assert [adapters.rank(name) for name in names] == [8, 16, 24] * 2
    assert adapters.num_pages(names) == 8
    assert len({digest_of(adapters.fetch(name)) for name in names}) == 6


def test_the_peer_is_asked_for_the_same() -> None:
    """A substitute for vLLM records its calls."""
    asked: list[tuple[int, int, int]] = []

    class Model:
        def __init__(self, model: str, **options: Any) -> None:
            assert (Path(model) / "config.json").exists()
            assert options["max_loras"] == 4
            assert options["max_lora_rank"] == 24

        def generate(self, prompts: list[Any], wish: Any, lora_request: Any, use_tqdm: bool) -> None:
            assert all(len(prompt["prompt_token_ids"]) == TINY.prompt_tokens for prompt in prompts)
            names = {request.name for request in lora_request or ()}
            asked.append((len(prompts), wish.max_tokens, len(names)))
            time.sleep(0.001 * wish.max_tokens)

    def request(name: str, index: int, path: str) -> SimpleNamespace:
        assert (Path(path) / "adapter_model.safetensors").exists()
        return SimpleNamespace(name=name)

    modules = {
        "vllm": SimpleNamespace(LLM=Model, SamplingParams=SimpleNamespace, __version__="0.0"),
        "vllm.lora.request": SimpleNamespace(LoRARequest=request),
    }
    found = peer.run(TINY, CPU, time.monotonic() + 60, modules.__getitem__)
    assert [case["num_adapters"] for case in found["cases"]] == [0, 1, 4]
    assert [num for _, _, num in asked] == [0] * 4 + [1] * 4 + [4] * 4
    assert {num for _, num, _ in asked} == {1, 1 + TINY.decode_steps}
    cut = peer.run(TINY, CPU, 0.0, modules.__getitem__)
    assert [case["num_adapters"] for case in cut["cases"]] == [0]
    assert cut["skipped"] == "[1, 4] adapters: no time left"


def test_a_run_without_rounds_to_spare_measures_once() -> None:
    assert steps.cases(TINY, has_graphs=True, overlaps=True, most_adapters=1)[0].graphs
    found = steps.run(TINY, CPU, deadline_s=0.0)
    assert found["num_rounds"] == 1


def test_what_ends_by_an_error_ends_the_section() -> None:
    model = steps.random_model(TINY, CPU)
    client = churn.Client(steps.engine_of(TINY, model, RandomAdapters(TINY), 2), TINY)
    with pytest.raises(Exception, match="adapter pool"):
        client.finish([client.ask("wide-0-r64", 2)])
    client.close()
