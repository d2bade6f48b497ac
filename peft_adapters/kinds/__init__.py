"""Kinds of PEFT adapters besides LoRA: which fields and tensors each has, and the rank rows that it is on a layer."""
