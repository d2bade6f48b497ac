"""Build the native kernels and say where they are."""

from lora_kernels.cpu.build import build_library

print(build_library())
