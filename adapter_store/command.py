"""`lorafleet adapters check` and `convert`: for adapters in folders, without a fleet."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adapter_store.blobs import AdapterFolder, texts_in
from adapter_store.formats import convert, depends_on_base, plan_conversion
from adapter_store.sources import choose_weights, needs_config
from peft_adapters.config import ADALORA, LORA
from peft_adapters.effect import check_idle, is_zero_operation, is_zero_product
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE, AdapterSpec, read_adapter
from peft_adapters.kinds.registry import kind_of
from peft_adapters.reasons import show
from protocol.runtime.environment import COMPUTE, HUB, HUB_CACHE, NETWORK, child_environment
from protocol.runtime.model_files import TOKENIZER_FILES, model_folder
from protocol.wire.errors import AdapterRefused, BadRequest, NotFound
from protocol.wire.messages import ServedModel

DESCRIBE_S = 600.0


def run(args: argparse.Namespace, describe: Callable[[str], ServedModel] | None = None) -> int:
    """Run the command; return the exit code. describe: returns the facts of a base model; None: `describe_base`.

    Raises BadRequest, NotFound; OSError.
    """
    base = (describe or describe_base)(args.base) if args.base else None
    try:
        return {"check": _check, "convert": _convert}[args.offline](args, base)
    except AdapterRefused as refused:
        console = Console(highlight=False)
        console.print(f"[bold red]refused[/]: {args.folder}")
        for reason in refused.reasons:
            console.print(f"  - {escape(reason)}", soft_wrap=True)
        return 1


def describe_base(model: str) -> ServedModel:
    """Return the facts of a base model that adapters must fit, from a process that has torch. Raises BadRequest."""
    if Path(model).expanduser().exists():
        model_folder(model, TOKENIZER_FILES)  # rejects anything but a model folder before that process starts
    done = subprocess.run(
        [sys.executable, "-m", "gpu_worker.describe", model],
        capture_output=True,
        text=True,
        timeout=DESCRIBE_S,
        env=child_environment(*COMPUTE, *HUB_CACHE, *HUB, *NETWORK),
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise BadRequest(f"--base {model}: {lines[-1] if lines else 'it cannot be read'}")
    return msgspec.json.decode(done.stdout.strip().splitlines()[-1], type=ServedModel)


def _weights_of(folder: Path) -> str:
    """Return the name of a folder's weights file. Raises NotFound, AdapterRefused."""
    if not folder.is_dir():
        raise NotFound(f"{folder} is not a folder")
    weights = choose_weights(os.listdir(folder))
    if not weights:
        raise NotFound(f"{folder} has neither {WEIGHTS_FILE} nor adapters.safetensors nor a file in GGUF")
    if needs_config(weights) and not (folder / CONFIG_FILE).is_file():
        raise NotFound(f"{folder} has no {CONFIG_FILE}")
    return weights


# ---------------------------------------------------------------- check


def _check(args: argparse.Namespace, base: ServedModel | None) -> int:
    folder, weights = args.folder, _weights_of(args.folder)
    conversion = plan_conversion(folder, weights, (folder / weights).stat().st_size, base)
    if conversion is None:
        files = AdapterFolder.read(folder)
        config, tensors = files.config, files.tensors
        sources = tensors
    else:
        config, tensors = conversion.config, conversion.infos()
        sources = {moved.name: moved.source for moved in conversion.tensors}
    if base is None and kind_of(config.get("peft_type")) is not None:
        raise BadRequest(f"checking an adapter of peft_type {config['peft_type']} needs its base model: --base")
    spec = read_adapter(config, tensors, base)
    texts = texts_in(folder)
    if texts is not None and base is not None:
        texts.check_base(base)
    raw = memoryview((folder / weights).read_bytes())
    check_idle(spec, sources, raw)
    zero = {
        part.site for part in (*spec.sites, *spec.embeddings, *spec.parameters) if is_zero_product(part, sources, raw)
    }
    zero |= {part.site for part in spec.operations if is_zero_operation(part, sources, raw)}
    rows = Counter(_rows(spec, zero))
    console = Console(highlight=False)
    table = Table("modules", "layers", "what", "rank", "scale", "takes effect", box=None, header_style="bold")
    for row, count in rows.items():
        effect = "yes" if row.has_effect else "no: it adds zero"
        table.add_row(escape(row.modules), str(count), row.what, row.rank, row.scale, effect)
    console.print(table)
    if conversion is not None:
        console.print(f"{weights}: read as `lorafleet adapters convert` would write it", soft_wrap=True)
    for theirs, own in spec.mapped.items():
        console.print(f"mapped: {escape(theirs)} → {escape(own)}", soft_wrap=True)
    if base is None:
        console.print("Without --base, these modules are not checked against the base model.", soft_wrap=True)
    if not any(row.has_effect for row in rows):
        console.print("[bold red]no effect[/]: everything that it adds to the base model is zero")
        return 1
    return 0


@dataclass(frozen=True, slots=True)
class _Row:
    """Modules of any number of layers that are changed in the same way."""

    modules: str
    what: str
    rank: str = ""
    scale: str = ""
    has_effect: bool = True


def _rows(spec: AdapterSpec, zero: set[str]) -> Iterator[_Row]:
    for part in (*spec.sites, *spec.embeddings, *spec.parameters):
        more = {"DoRA": part.magnitude, "bias": part.bias, "AdaLoRA": part.singular}
        kind = "LoRA" if part.of_kind is None else part.of_kind.kind
        what = " + ".join([kind, *(name for name, tensor in more.items() if tensor)])
        yield _Row(_pattern(part.site), what, str(part.rank), f"{part.scale:g}", part.site not in zero)
    for part in spec.operations:
        yield _Row(_pattern(part.site), part.kind, has_effect=part.site not in zero)
    for whole in spec.replaced:
        yield _Row(_pattern(whole.site), f"whole {whole.parameter}")
    for part in spec.idle:
        yield _Row(_pattern(part.site), "zero LoRA, on a layer not run", str(part.rank), f"{part.scale:g}", False)
    if spec.virtual is not None:
        yield _Row("prompt", f"{spec.virtual.num} virtual tokens")
    for tokens in spec.tokens:
        yield _Row(_pattern(tokens.site), f"{len(tokens.indices)} trained tokens")


def _pattern(module: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", module)


# ---------------------------------------------------------------- convert


def _convert(args: argparse.Namespace, base: ServedModel | None) -> int:
    folder, weights = args.folder, _weights_of(args.folder)
    if depends_on_base(weights) and base is None:
        raise BadRequest("converting a GGUF adapter needs its base model: --base")
    conversion = plan_conversion(folder, weights, (folder / weights).stat().st_size, base)
    if conversion is None:
        return _approximate(args, base)
    read_adapter(conversion.config, conversion.infos(), base)
    try:
        args.target.mkdir(parents=True)
    except FileExistsError:
        raise BadRequest(f"{args.target} exists already") from None
    convert(folder, weights, conversion, args.target)
    print(f"{args.target}: {len(conversion.tensors)} tensors, digest {AdapterFolder.open(args.target).digest()}")
    return 0


def _approximate(args: argparse.Namespace, base: ServedModel | None) -> int:
    """Approximate a PEFT adapter of another kind by LoRA, in a process that has torch. Raises BadRequest."""
    kind: Any = AdapterFolder.read(args.folder).config.get("peft_type")
    if not args.rank or kind in (LORA, ADALORA):
        hint = "" if kind in (LORA, ADALORA) else "; --rank auto approximates it by LoRA"
        raise BadRequest(f"{args.folder} is already a PEFT adapter, of kind {show(kind)}{hint}")
    if base is None:
        raise BadRequest("approximating an adapter needs the weights of its base model: --base")
    if not 0 < args.keep <= 1:
        raise BadRequest(f"--keep {args.keep:g} is not a fraction from 0 to 1")
    if args.target.exists():
        raise BadRequest(f"{args.target} exists already")
    words = (args.base, str(args.folder), str(args.target), str(args.keep))
    done = subprocess.run(
        [sys.executable, "-m", "gpu_worker.svd_convert", *words],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(*COMPUTE, *HUB_CACHE, *HUB, *NETWORK),
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise BadRequest(f"{args.folder}: {lines[-1] if lines else 'it cannot be converted'}")
    errors: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    files = AdapterFolder.read(args.target)
    rank = read_adapter(files.config, files.tensors, base).rank
    worst = max(errors, key=errors.__getitem__, default="")
    print(f"{args.target}: LoRA of rank {rank} at most, digest {files.digest()}")
    print(f"largest error of {len(errors)} layers: {errors.get(worst, 0.0):.2g} of the norm, at {worst}")
    return 0
