"""Adapters in other files than PEFT's, as a plan to write them in PEFT's. Pure: headers in, a plan or a refusal out."""
