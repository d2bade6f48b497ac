"""The import graph is as designed, a wheel contains the right files under the right names, and test names are short."""

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Set
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SERVICES = {"gateway", "scheduler", "gpu_worker", "adapter_store"}
WHEEL = {
    "protocol": "protocol",
    "lora_kernels": "kernels/lora_kernels",
    "lorafleet": "lorafleet",
    "peft_adapters": "peft_adapters",
    **{service: service for service in SERVICES},
}
PACKAGES = {**WHEEL, "chaos": "chaos"}  # it kills fleets: a tool of this repository, not for its users
MAY_IMPORT = {
    "protocol": set(),
    "lora_kernels": set(),
    "peft_adapters": {"protocol"},
    "gateway": {"protocol", "peft_adapters"},
    "scheduler": {"protocol"},
    "adapter_store": {"protocol", "peft_adapters"},
    "gpu_worker": {"protocol", "peft_adapters", "lora_kernels"},
    "lorafleet": {"protocol"},  # it starts services by name, in processes of their own
    "chaos": {"protocol", "lorafleet", "gpu_worker"},  # only the sampling functions of the worker
}
LAYERED = ("gateway", "gpu_worker", "protocol", "lorafleet")
"""Packages whose subfolders ("rooms") are layers."""

HEAVY = {"torch", "transformers", "peft", "accelerate", "triton"}
HTTP_FRAMEWORKS = {"fastapi", "starlette", "uvicorn"}
MAY_BE_HEAVY = {"gpu_worker", "lora_kernels", "chaos"}

PATCHES = {
    "gateway/bodies/test_json_outline.py",  # how much msgspec reads at once
    "gateway/calls/test_keys_again.py",  # how often a queue is called
    "gateway/http/test_dispatch.py",  # in which thread FastAPI builds a route
    "gateway/http/test_faults.py",  # a panic of the tokenizers library
    "gateway/http/test_life.py",  # a queue that runs a command whose reply is lost; one that was restarted
    "gateway/test_added_bases.py",  # files that take as long to read as the test wants
    "gateway/test_loop_lag.py",  # which code reads, checks and frees bodies, and in which thread
    "gateway/overload/test_refusals.py",  # a queue that is slow for as long as the test wants
    "gpu_worker/adapters/loader/test_reserve.py",  # a system that refuses another process
    "gpu_worker/cuda/test_waits.py",  # a torch mode that needs a GPU
    "gpu_worker/model/test_kept_answers.py",  # versions of libraries, and processors
    "gpu_worker/sampling/test_grammars.py",  # a library that fails
    "gpu_worker/service/test_service.py",  # the pause between heartbeats; the order of calls to engine and queue
    "gpu_worker/service/test_start_failures.py",  # a model that cannot be loaded; a queue that refuses workers at first
    "gpu_worker/service/test_swap.py",  # a process that is replaced; files and a queue that hang
    "gpu_worker/test_memory.py",  # a GPU's memory as torch reports it
    "hostile/test_loops.py",  # loops that fail, in the tables of all services
    "kernels/test_linear.py",  # the processor as torch reports it
    "kernels/triton/test_lora.py",  # which kernels are launched
    "lorafleet/operate/test_commands.py",  # keyboard input
    "oracle/adapters/test_expert_rows.py",  # which experts a step reaches
    "oracle/adapters/test_peft_experts.py",  # expert modules of an unknown form
    "oracle/test_architectures.py",  # a model that is computed incorrectly
    "oracle/test_stack.py",  # intermediate results of transformers
    "protocol/queue/test_bus.py",  # a restart between two commands
    "protocol/queue/test_history.py",  # how many commands are sent at once
    "protocol/queue/test_sealing.py",  # a key that expires between two commands
    "protocol/runtime/test_model_files.py",  # a folder of another user of the system
    "protocol/runtime/test_private_files.py",  # another user of the system
    "scheduler/test_service.py",  # the pause between reads of heartbeats
}
"""Test files that replace an attribute -> the replaced thing, as a comment."""

CONVERTER = ROOT / "lorafleet/convert_gguf.py"  # a process of its own, started only by the quickstart


def sources(package: str) -> list[Path]:
    """Return the Python files of a package."""
    return sorted((ROOT / PACKAGES[package]).rglob("*.py"))


@cache
def import_nodes(path: Path) -> tuple[ast.stmt, ...]:
    """Return every import statement of a file, including those inside functions."""
    nodes = ast.walk(ast.parse(path.read_text(), path))
    return tuple(node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom))


def imports(path: Path) -> Iterator[str]:
    """Yield the top-level name of every import of a file, including those inside functions."""
    for node in import_nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            yield str(node.module).split(".")[0]


def run_python(code: str) -> str:
    """Run code in a fresh interpreter at the repository's root; return its output."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_packages_import_only_what_the_design_allows(package: str) -> None:
    assert sources(package), "the check would prove nothing"
    allowed = MAY_IMPORT[package] | {package}
    for path in sources(package):
        found = set(imports(path))
        assert found & PACKAGES.keys() <= allowed, path
        assert "kernels" not in found, f"{path}: our kernels are imported as lora_kernels"
        assert package == "chaos" or not found & {"benchmarks", "tests"}, path
        if package not in MAY_BE_HEAVY and path != CONVERTER:
            assert not found & HEAVY, path
        if package == "protocol":
            assert not found & HTTP_FRAMEWORKS, path


def dotted_imports(path: Path) -> Iterator[str]:
    """Yield the full name of every module from which a file imports."""
    for node in import_nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def module_graph() -> dict[str, set[str]]:
    """Return for each of our modules those that it imports, also inside functions and for type checkers alone."""
    modules: dict[str, Path] = {}
    for package in PACKAGES:
        root = ROOT / "kernels" if package == "lora_kernels" else ROOT
        for path in sources(package):
            parts = path.relative_to(root).with_suffix("").parts
            modules[".".join(parts).removesuffix(".__init__")] = path
    return {name: set(imported_modules(path, modules.keys())) for name, path in modules.items()}


def imported_modules(path: Path, modules: Set[str]) -> Iterator[str]:
    """Yield those of the given modules that a file imports or from which it imports names."""
    for node in import_nodes(path):
        names: list[tuple[str, str]] = []
        if isinstance(node, ast.Import):
            names = [(alias.name, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(f"{node.module}.{alias.name}", str(node.module)) for alias in node.names]
        yield from (found for pair in names if (found := next((name for name in pair if name in modules), "")))


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = module_graph()
    assert "gpu_worker.build" in graph["gpu_worker.service.program"], "imports inside functions count"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def rooms_of(package: str) -> list[str]:
    """Return the rooms of a package from the lowest to the highest, as docs/structure.md#layers lists them."""
    page = (ROOT / "docs/structure.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith(f"| `{package}/` | `"))
    return re.findall(r"`([^`]+)`", line.split("|")[2])


@pytest.mark.parametrize("package", LAYERED)
def test_rooms_are_layers(package: str) -> None:
    """A room imports only rooms below it. A module beside the rooms counts as its own room, at any height."""
    graph, rooms = module_graph(), rooms_of(package)
    height = {room: number for number, room in enumerate(rooms)}
    parts = {name: name.split(".") for name in graph}
    inside = {name: part[1] for name, part in parts.items() if part[0] == package and len(part) > 2}
    assert set(inside.values()) == set(rooms), "docs/structure.md names every room, and no others"
    upward = [
        f"{name} imports {found}"
        for name, room in inside.items()
        for found in graph[name]
        if found in inside and height[inside[found]] > height[room]
    ]
    assert upward == []
    between = TopologicalSorter[str]()
    for name, found in graph.items():
        if parts[name][0] == package and len(parts[name]) > 1:
            own = inside.get(name, name)
            others = (inside.get(one, one) for one in found if parts[one][0] == package and len(parts[one]) > 1)
            between.add(own, *(one for one in others if one != own))
    between.prepare()  # raises if a module beside the rooms closes a cycle


def test_a_class_name_has_one_meaning() -> None:
    """Public class names are unique among all packages, so that a search for one finds one class."""
    found: dict[str, list[str]] = {}
    for package in WHEEL:
        for path in sources(package):
            for name in re.findall(r"^ *class ([^\W_]\w*)[(\[:]", path.read_text(), re.MULTILINE):
                found.setdefault(name, []).append(path.relative_to(ROOT).as_posix())
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


MAX_UNFORMATTED = 160
"""Maximum number of product statements excluded from formatting: data tables, and code that would fill a page."""


def test_the_formatter_has_the_last_word() -> None:
    paths = [path for package in WHEEL for path in sources(package)]
    assert sum(path.read_text().count("# fmt: skip") for path in paths) <= MAX_UNFORMATTED


def test_only_the_queue_package_touches_redis() -> None:
    """All other packages call typed methods: none imports a Redis client or uses `Bus._redis`."""
    queue = ROOT / "protocol/queue"
    paths = [path for package in PACKAGES for path in sources(package)] + sorted((ROOT / "deploy").glob("*.py"))
    for path in paths:
        if path.is_relative_to(queue):
            continue
        if "redis" not in (text := path.read_text()):
            continue
        assert "redis" not in set(imports(path)), path
        nodes = ast.walk(ast.parse(text, path))
        assert not {node.attr for node in nodes if isinstance(node, ast.Attribute)} & {"redis", "_redis"}, path


def test_peft_adapters_knows_only_errors_and_messages() -> None:
    allowed = {"protocol.wire", "protocol.wire.errors", "protocol.wire.messages", "protocol.wire.tokens"}
    for path in sources("peft_adapters"):
        modules = {name for name in dotted_imports(path) if name.startswith("protocol")}
        assert {name for name in modules if not name.startswith(tuple(f"{a}." for a in allowed))} <= allowed, path


def test_the_gateway_reads_no_adapter_files() -> None:
    """The gateway knows only the names of adapter merges, and which texts an adapter may bring."""
    for path in sources("gateway"):
        found = {name for name in dotted_imports(path) if name.startswith("peft_adapters.")}
        known = ("peft_adapters.recipe", "peft_adapters.texts.files", "peft_adapters.texts.tokenizer_json")
        assert all(name.startswith(known) for name in found), path


def test_names_of_tests_are_short() -> None:
    """A name of 70 characters or more is a sentence, which belongs in the docstring."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    assert paths, "the check would prove nothing"
    long_names = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in paths
        for name in re.findall(r"^ *(?:async )?def (test_\w{65,})", path.read_text(), re.MULTILINE)
    ]
    assert long_names == []


def test_tests_patch_nothing_of_ours() -> None:
    """Tests change parameters or settings. Those in PATCHES simulate faults, or observe, where no parameter exists."""
    patching = {
        path.relative_to(ROOT / "tests").as_posix()
        for path in (ROOT / "tests").rglob("*.py")
        if re.search(r"\.(setattr|setitem|delattr)\b", text := path.read_text())
        for node in ast.walk(ast.parse(text, path))
        if isinstance(node, ast.Call)
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("setattr", "setitem", "delattr")
    }
    assert patching <= PATCHES


def test_clients_of_tests_wait_for_a_busy_machine() -> None:
    """The client's default timeout is 5 s, which is too short on a busy machine."""
    call = re.compile(r"httpx2\.(?:Async)?Client\((?:[^()]|\([^()]*\))*\)")
    calls = [
        (path.relative_to(ROOT).as_posix(), made)
        for path in (ROOT / "tests").rglob("*.py")
        for made in call.findall(path.read_text())
    ]
    assert calls, "the check would prove nothing"
    assert [made for made in calls if "timeout=" not in made[1] and "transport=" not in made[1]] == []


def test_the_gateway_makes_http_clients_in_threads_alone() -> None:
    """The first client blocks an event loop for 100 ms, each further one for 5 ms: it reads all certificates."""
    makes = re.compile(r"httpx2\.(?:AsyncClient|Client|create_ssl_context)\b[^]]")
    found = {
        path.relative_to(ROOT).as_posix(): len(makes.findall(path.read_text()))
        for path in (ROOT / "gateway").rglob("*.py")
    }
    allowed = {"gateway/http/http_client.py": 3, "gateway/webhooks/outside.py": 1}
    assert {path: num for path, num in found.items() if num} == allowed, "these make them in threads"


def test_importing_light_packages_loads_no_torch() -> None:
    """All packages are imported in one process, for speed: a module that is not loaded then was imported by none."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in sorted(PACKAGES.keys() - MAY_BE_HEAVY)
        for path in sources(package)
        if path != CONVERTER and path.name not in ("__init__.py", "__main__.py")
    ]
    assert {module.split(".")[0] for module in modules} == PACKAGES.keys() - MAY_BE_HEAVY
    check = f"\n    if found := {HEAVY!r} & sys.modules.keys(): sys.exit(f'{{name}} loads {{found}}')"
    run_python(f"import importlib, sys\nfor name in {modules!r}:\n    importlib.import_module(name){check}")


def test_the_worker_shell_imports_torch_only_when_it_loads_a_model() -> None:
    assert run_python("import sys, gpu_worker.service.program; print('torch' in sys.modules)") == "False"


def test_a_process_of_the_sandbox_starts_without_numpy() -> None:
    """Importing numpy takes half of such a start, which competes with the machine's other work."""
    assert run_python("import sys, gateway.sandbox.child; print('numpy' in sys.modules)") == "False"


def test_kernels_never_finds_our_code(tmp_path: Path) -> None:
    """transformers imports Hugging Face's `kernels` by that name: our folder must neither answer to it nor hide it."""
    assert not (ROOT / "kernels/__init__.py").exists()
    origin = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    assert run_python(origin) == "None"
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("get_kernel = 'theirs'\n")
    behind_us = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.get_kernel)"
    assert run_python(behind_us) == "theirs"


@pytest.mark.thorough
def test_transformers_and_peft_import_beside_us() -> None:
    code = "from transformers import LlamaForCausalLM; import peft, lora_kernels; print(LlamaForCausalLM.__name__)"
    assert run_python(code) == "LlamaForCausalLM"


def test_the_wheel_holds_every_package_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == WHEEL.keys()
    for package, folder in WHEEL.items():
        for path in sources(package):
            assert f"{package}/{path.relative_to(ROOT / folder)}" in names
    scripts = {f"protocol/queue/lua/{path.name}" for path in (ROOT / "protocol/queue/lua").glob("*.lua")}
    assert scripts
    assert scripts <= set(names)
    assert "gateway/bodies/parameters.toml" in names
