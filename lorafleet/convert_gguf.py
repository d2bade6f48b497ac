"""`python -m lorafleet.convert_gguf MODEL.gguf FOLDER` converts a GGUF model to a bf16 safetensors folder.

It runs in its own process, so that a launcher that needs it once does not keep torch in memory. It prints one line per
step.
"""

import sys
from pathlib import Path
from typing import Any

STEPS = ("Loading torch and transformers", "Reading the tokenizer", "Expanding the weights", "Writing bf16 safetensors")


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model, tokenizer and chat template of `gguf` to `folder`. Raises the errors of transformers."""
    print(STEPS[0], flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(STEPS[1], flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    print(STEPS[2], flush=True)
    # Any: three attributes below are not part of the model's declared interface.
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    print(STEPS[3], flush=True)
    # transformers still regards the expanded model as quantized, and refuses to save such a model.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
