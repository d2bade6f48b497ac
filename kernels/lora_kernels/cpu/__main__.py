"""Builds the native kernels for this processor and prints where they are: `--all` for each instruction set it has."""

import logging
import sys

from lora_kernels import cpu
from lora_kernels.cpu.build import build_library

logging.basicConfig(level=logging.INFO, format="%(message)s")
if cpu.load():
    for isa in cpu.isas() if "--all" in sys.argv[1:] else [cpu.isa()]:
        print(build_library(isa))
