"""Builds the native kernels for this processor ahead of time, and prints where they are."""

import argparse
import logging

from lora_kernels import cpu
from lora_kernels.cpu.build import build_library

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "--sets",
    choices=("best", "tried", "all"),
    default="best",
    help="the instruction set that is used; those that tests try; or all that the processor has (%(default)s)",
)
args = parser.parse_args()
logging.basicConfig(level=logging.INFO, format="%(message)s")
if cpu.load():
    for isa in {"best": [cpu.isa()], "tried": cpu.tried_isas(), "all": cpu.isas()}[args.sets]:
        print(build_library(isa))
