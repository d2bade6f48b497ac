"""Products with quantized weights on a CPU, compared with a read of the same bytes and with bf16, in one run.

    python -m benchmarks.engine.quantised [--sets avx2,avx512] [--rows 1,2,4] [--layers N]
    python -m benchmarks.engine.quantised --cached [--sets avx512_vnni]

Eight layers of 8,192 x 2,048 of each kind, for 1 to 512 rows, in bf16, or in fp32 for an instruction set without bf16
products. Figures are minimums of calls that alternate with a read of the same number of bytes (their sum, on all
threads). The run takes two minutes. A machine whose cache holds eight layers needs more of them (--layers). With
--cached one thread multiplies one layer of 1,024 x 2,048 of each kind repeatedly, alternately, to measure arithmetic
alone, which other load on the machine hardly affects. There "int8" is the same product with int8 inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.common import report
from lora_kernels import cpu, ops
from lora_kernels.quantised import Kind, QuantisedWeight, row_bytes

N, K = 8192, 2048
ROWS, NUM_LAYERS = "1,2,4,8,32,128,512", 8
SHOWN: tuple[Kind, ...] = ("q4_0", "q4_1", "q4_k", "q8_0", "q6_k")
ROUNDS = 15


CACHED_N, CACHED_S = 1024, 0.25
CACHED_ROWS = (1, 2, 4, 8, 14, 32, 128, 512)


def layers_of(kind: Kind | None, num: int, n: int = N) -> list[ops.PackedLinear | ops.QuantisedLinear]:
    """Return `num` packed layers [n, K] of a kind; None: bf16."""
    if kind is None:
        return [ops.pack_linear(torch.randn(n, K).to(torch.bfloat16)) for _ in range(num)]
    blocks = torch.randint(0, 256, (n, row_bytes(kind, K)), dtype=torch.uint8)
    return [ops.pack_quantised([QuantisedWeight(kind, blocks, K)]) for _ in range(num)]


def bytes_of(layers: list[ops.PackedLinear | ops.QuantisedLinear]) -> int:
    """Return the number of bytes that a product with all layers reads."""
    tensors = [
        t for layer in layers for t in (layer.panels if isinstance(layer, ops.QuantisedLinear) else [layer.weight])
    ]
    return sum(tensor.nbytes for tensor in tensors)


def run(layers: list[ops.PackedLinear | ops.QuantisedLinear], x: Tensor) -> None:
    """Multiply by all layers."""
    for layer in layers:
        ops.linear(x, layer)


def least(calls: list[Callable[[], object]]) -> list[float]:
    """Return the minimum seconds of each call; the calls alternate."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS + 1):
        for own, call in zip(times, calls, strict=True):
            begin = time.perf_counter()
            call()
            own.append(time.perf_counter() - begin)
    return [min(own[1:]) for own in times]


def cached() -> None:
    """Measure one thread on one layer of each kind, and print its best GFLOP/s."""
    torch.set_num_threads(1)
    kinds = (*SHOWN, None)
    exact = {kind or "bf16": layers_of(kind, 1, CACHED_N)[0] for kind in kinds}
    layers: dict[str, ops.PackedLinear | ops.QuantisedLinear] = {}
    for name, layer in exact.items():
        layers[name] = layer
        if isinstance(layer, ops.QuantisedLinear):
            layers[f"{name}, int8"] = replace(layer, int8_inputs=True)
    rows: list[tuple[object, ...]] = []
    for num in CACHED_ROWS:
        x, best = torch.randn(num, K).to(torch.bfloat16), [float("inf")] * len(layers)
        end = time.perf_counter() + CACHED_S * len(layers)
        while time.perf_counter() < end:
            for i, layer in enumerate(layers.values()):
                for _ in range(3):
                    begin = time.perf_counter()
                    run([layer], x)
                    best[i] = min(best[i], time.perf_counter() - begin)
        rows.append((num, *(f"{2e-9 * num * CACHED_N * K / least:.0f}" for least in best)))
    print(report.table(("rows", *layers), rows))


def measured(kind: Kind | None, row_counts: list[int], num_layers: int) -> Iterator[dict[str, float | int]]:
    """Yield the time of products for each number of rows, and of a read, with the active instruction set."""
    layers, dtype = layers_of(kind, num_layers), torch.bfloat16 if "bf16" in cpu.isa() else torch.float32
    size = bytes_of(layers)
    read = partial(torch.sum, torch.ones(size // 4))
    for rows in row_counts:
        own, floor = least([partial(run, layers, torch.randn(rows, K).to(dtype)), read])
        work = 2e-9 * rows * N * K * num_layers
        yield {"rows": rows, "ms": 1e3 * own, "gb_per_s": 1e-9 * size / own, "read_gb_per_s": 1e-9 * size / floor,
               "gflop_per_s": work / own}  # fmt: skip


def main() -> None:
    """Measure, print a table, and save the figures."""
    parser = report.parser(__doc__, without=("model", "short"))
    parser.add_argument("--sets", help="instruction sets (default: the one that the processor is used with)")
    parser.add_argument("--rows", default=ROWS, help="how many (%(default)s)")
    parser.add_argument("--layers", type=int, default=NUM_LAYERS, help="of each kind (%(default)s)")
    parser.add_argument("--cached", action="store_true", help="one layer in the cache and one thread; nothing is saved")
    args = parser.parse_args()
    about = report.native_machine()
    if args.cached:
        if (args.rows, args.layers, args.out) != (ROWS, NUM_LAYERS, report.RESULTS):
            parser.error("--cached takes no other argument than --sets, with one set")
        if args.sets and args.sets not in cpu.isas():
            parser.error(f"--cached takes one set of {', '.join(cpu.isas())}; not {args.sets!r}")
        cpu.set_isa(args.sets or cpu.isa())
        with torch.inference_mode():
            cached()
        return
    points: list[dict[str, float | int | str]] = []
    best = cpu.isa()
    cases: list[tuple[str, Kind | None]] = [(name, kind) for name in (args.sets or best).split(",") for kind in SHOWN]
    with torch.inference_mode():
        for name, kind in [*cases, (best, None)]:
            cpu.set_isa(name)
            of_kind = measured(kind, [int(number) for number in args.rows.split(",")], args.layers)
            points += [{"set": name, "kind": kind or "bf16"} | point for point in of_kind]
    rows = [
        (p["set"], p["kind"], p["rows"], f"{p['ms']:.2f}", f"{p['gb_per_s']:.1f}", f"{p['read_gb_per_s']:.1f}",
         f"{p['gflop_per_s']:.0f}")
        for p in points
    ]  # fmt: skip
    print(report.table(("instruction set", "weights", "rows", "ms", "GB/s", "a read, GB/s", "GFLOP/s"), rows))
    report.save(args.out / "quantised", about | {"points": points})


if __name__ == "__main__":
    main()
