"""Builds the native kernels and prints where they are."""

from lora_kernels.cpu.build import build_library

print(build_library())
