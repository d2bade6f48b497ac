"""Kinds of PEFT adapters besides LoRA: the fields and tensors of each, and its form as rank rows on a layer."""
