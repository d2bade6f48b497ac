"""The routes that show what a tokenizer does: LoRAX's and vLLM's."""
