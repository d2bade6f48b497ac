"""`python -m gpu_worker.describe MODEL` prints what adapters of a base model must fit, as JSON, without its weights.

Sites come from the model's classes alone. A worker also traces a trial run, so it may reject a module listed here that
is not computed token by token. Runs as its own process, so that other services need no torch.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gpu_worker.layers.adaptable_modules import is_norm, parameter_shapes
from gpu_worker.layers.lora import linear_shape
from gpu_worker.loading.checkpoint import CLASSES, head_dim_of, read_config, task_of
from gpu_worker.tasks.headless import has_no_lm_head
from gpu_worker.tasks.model_tasks import head_name_of
from peft_adapters.texts.files import TOKENIZER
from peft_adapters.texts.tokenizer_json import parts_of
from protocol.runtime.model_files import TOKENIZER_FILES, model_folder, served_name
from protocol.wire.errors import LorafleetError
from protocol.wire.messages import ServedModel, SiteShape


def describe(model: str) -> ServedModel:
    """Return what adapters of a model must fit.

    model: a folder or a Hub id. Raises BadRequest, and the Hub's OSErrors.
    """
    folder = model_folder(model, TOKENIZER_FILES)
    config, tokenizer = read_config(folder), folder / TOKENIZER
    task = task_of(config)
    with torch.device("meta"):
        module = CLASSES[task].from_config(config)
    text = config.get_text_config()
    name = next(iter(getattr(config, "architectures", None) or ()), "")
    if task == "generate" and has_no_lm_head(name):
        module.set_output_embeddings(nn.Identity())
    is_decoder = task == "generate"
    return ServedModel(
        model=model, name=served_name(model, ""), fingerprint="", model_type=config.model_type,
        vocab_size=text.vocab_size, max_model_len=0, sites=sites_of(module),
        tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)), task=task, head_dim=head_dim_of(config),
        label_head=head_name_of(config) if is_decoder else _label_head(module) if task == "score" else "",
        width=text.hidden_size if is_decoder else 0,
        tokenizer=parts_of(tokenizer.read_text()) if tokenizer.is_file() else {},
    )  # fmt: skip


def _label_head(model: PreTrainedModel) -> str:
    """Return the last linear layer outside the body that has one output per label, "" if there is none."""
    body, num = f"{model.base_model_prefix}.", model.config.num_labels
    shapes = {name: linear_shape(module) for name, module in model.named_modules() if not name.startswith(body)}
    return next((name for name, shape in reversed(shapes.items()) if shape is not None and shape[0] == num), "")


def sites_of(model: PreTrainedModel) -> list[SiteShape]:
    """Return the modules and parameters that adapters may change: of a model's decoder and head, or of an encoder."""
    decoder: Any = model.get_decoder()
    inside = {part for root in (decoder, model.get_output_embeddings()) if root is not None for part in root.modules()}
    whole = not inside
    found: list[SiteShape] = []
    for name, module in model.named_modules():
        if whole or module in inside:
            found += _sites(name, module)
    return found


def _sites(name: str, module: nn.Module) -> list[SiteShape]:
    if shape := linear_shape(module):
        rows, width = shape
        has_bias = getattr(module, "bias", None) is not None
        return [SiteShape(name, width, rows, "conv1d" if isinstance(module, Conv1D) else "linear", has_bias)]
    if isinstance(module, nn.Embedding):
        return [SiteShape(name, module.num_embeddings, module.embedding_dim, "embedding")]
    if is_norm(module):
        width = len(module.get_parameter("weight"))
        return [SiteShape(name, width, width, "norm", module._parameters.get("bias") is not None)]
    return parameter_shapes(name, module)


def main() -> int:
    """Print the description of the model named on the command line; return the exit code."""
    try:
        print(msgspec.json.encode(describe(sys.argv[1])).decode())
    except (LorafleetError, OSError) as error:
        print(error.message if isinstance(error, LorafleetError) else error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
