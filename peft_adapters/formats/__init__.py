"""Adapters in other file formats, as a plan for writing them in PEFT's. Pure: headers in, a plan or a refusal out."""
