"""Memory in large pages for packed weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lora_kernels.cpu.large_pages import PAGE, LargePages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is asked for as Linux has it")


def test_parts_are_apart_and_keep_their_numbers() -> None:
    memory = LargePages()
    sizes = (1, 33, 1_000, 0, 3 * PAGE, 40 * PAGE, 7)
    parts = [memory.empty((size, 3), torch.bfloat16) for size in sizes]
    for i, part in enumerate(parts):
        part.fill_(i)
    for i, (size, part) in enumerate(zip(sizes, parts, strict=True)):
        assert part.shape == (size, 3)
        assert part.is_contiguous()
        assert part.data_ptr() % 64 == 0
        assert bool((part == i).all())


def test_parts_taken_in_inference_mode_can_be_written_outside() -> None:
    memory = LargePages()
    with torch.inference_mode():
        memory.empty((4,), torch.float32)
    memory.empty((4,), torch.float32).fill_(1)


def test_mapping_goes_when_its_last_part_goes() -> None:
    memory = LargePages()
    first, second = memory.empty((PAGE,), torch.uint8), memory.empty((PAGE,), torch.uint8)
    place = second.data_ptr()
    second.fill_(5)
    memory.empty((100 * PAGE,), torch.uint8)  # gets a mapping of its own; the shared one stays
    del first
    assert _flags_at(place) is not None
    assert int(second[-1]) == 5
    del second, memory
    assert _flags_at(place) is None


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the kernel has no large pages")
def test_large_pages_are_asked_for_as_long_as_patience_lasts() -> None:
    part, impatient = LargePages().empty((PAGE,), torch.uint8), LargePages(patience_s=0).empty((PAGE,), torch.uint8)
    assert part.data_ptr() % PAGE == impatient.data_ptr() % PAGE == 0
    impatient.fill_(1)
    assert "hg" in (_flags_at(part.data_ptr()) or [])
    assert "hg" not in (_flags_at(impatient.data_ptr()) or [])


def _flags_at(place: int) -> list[str] | None:
    """Return the kernel's flags of the mapping at an address; None if nothing is mapped there."""
    is_there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:
            begin, end = (int(part, 16) for part in first.split("-"))
            is_there = begin <= place < end
        elif is_there and first == "VmFlags:":
            return rest
    return None
