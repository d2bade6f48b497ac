"""The tokenizer routes of LoRAX and vLLM."""
