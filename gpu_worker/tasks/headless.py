"""Decoders without a language model's head: bare ones, sequence classifiers, and those for embeddings.

Each is put into the causal LM of its type, with an identity as head, so that all code for causal LMs applies to it,
including adapters' module names. Its logits would be hidden states, which are never used.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from gpu_worker.loading.checkpoint import read_config, read_model, refusal
from gpu_worker.tasks.model_tasks import (
    ModelTasks,
    decoder_of,
    head_in,
    head_name_of,
    read_decoder_pooling,
    read_score_tokens,
)
from gpu_worker.tasks.pooling import MODULES
from protocol.wire.errors import BadRequest
from protocol.wire.messages import MAX_LABELS

BARE, CLASSIFIER = "Model", "ForSequenceClassification"
"""Suffixes of the names of classes without a language model's head."""


def has_no_lm_head(architecture: str) -> bool:
    """Return whether a class, judging by its name, has no language model's head."""
    return architecture.endswith((BARE, CLASSIFIER)) and not architecture.endswith("LMHeadModel")


def read_decoder(
    folder: Path, device: torch.device, dtype: torch.dtype, score_tokens: str = ""
) -> tuple[PreTrainedModel, ModelTasks]:
    """Load a folder's decoder for its task. Raises BadRequest, in one line.

    score_tokens: see `read_score_tokens`.
    """
    config = read_config(folder)
    name = next(iter(getattr(config, "architectures", None) or ()), "")
    tokens = read_score_tokens(folder, score_tokens)
    tasks = ModelTasks(
        pooling=read_decoder_pooling(folder),
        head_name=head_name_of(config),
        score_tokens=tokens,
        labels=[] if tokens is None else ["LABEL_0"],
    )
    if tokens is not None and has_no_lm_head(name):
        raise BadRequest(f"{name} has no language modelling head to score tokens with")
    if name.endswith(CLASSIFIER):
        return _classifier(read_model(folder, device, dtype, AutoModelForSequenceClassification), tasks)
    if has_no_lm_head(name):
        return in_causal_lm(read_model(folder, device, dtype, AutoModel)), replace(tasks, generates=False)
    module = read_model(folder, device, dtype, may_lack_head=(folder / MODULES).is_file())
    generates = not isinstance(module.get_output_embeddings(), nn.Identity)
    if tokens is not None and not (generates and max(tokens) < config.get_text_config().vocab_size):
        raise BadRequest(f"the tokens {tokens} of a score are outside the head's vocabulary")
    return module, replace(tasks, generates=generates)


def _classifier(module: PreTrainedModel, tasks: ModelTasks) -> tuple[PreTrainedModel, ModelTasks]:
    """Return a sequence classifier's decoder in a causal LM, and the tasks with its head. Raises BadRequest."""
    found, decoder = head_in(module), decoder_of(module)
    if found is None or decoder is None:
        raise refusal(module, ["a classification head that is more than a matrix"])
    name, linear = found
    if linear.out_features > MAX_LABELS:
        raise refusal(module, [f"{linear.out_features} labels; the limit is {MAX_LABELS}"])
    names: Any = module.config.id2label or {}
    labels = [str(names.get(index, f"LABEL_{index}")) for index in range(linear.out_features)]
    head = linear.weight.detach()
    return in_causal_lm(decoder), replace(tasks, generates=False, head=head, head_name=name, labels=labels)


def in_causal_lm(decoder: nn.Module) -> PreTrainedModel:
    """Return the causal LM of a decoder's type, with this decoder and without a head. Raises BadRequest."""
    config: Any = decoder.config
    with torch.device("meta"):
        shell: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    made = decoder_of(shell)
    if type(made) is not type(decoder):
        raise BadRequest(f"{type(decoder).__name__} is not the decoder of {type(shell).__name__}")
    setattr(shell, shell.base_model_prefix, decoder)
    shell.set_output_embeddings(nn.Identity())
    left = [name for name, tensor in (*shell.named_parameters(), *shell.named_buffers()) if tensor.is_meta]
    if left:
        raise refusal(shell, [f"more than a decoder and a head: {left[0]}"])
    return shell.eval().requires_grad_(False)
