"""Loads a draft model or a head of the base, and refuses one that cannot draft for the base."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open

from gpu_worker.drafting.draft_head import DraftHead
from gpu_worker.drafting.draft_model import DraftModel
from gpu_worker.drafting.eagle import EAGLE3, load_head
from gpu_worker.drafting.head import BaseHead
from gpu_worker.drafting.mtp import PREFIX, load_mtp
from gpu_worker.drafting.payoff import Payoff
from gpu_worker.engine.engine import EngineConfig
from gpu_worker.engine.runner import Runner
from gpu_worker.loading.checkpoint import UNREADABLE, one_line, read_config, task_of
from gpu_worker.loading.weights import weight_files
from gpu_worker.model.model import BaseModel
from gpu_worker.model.prepare import load_model
from gpu_worker.tasks.headless import has_no_lm_head
from lora_kernels import ops
from peft_adapters.texts.files import TOKENIZER
from peft_adapters.texts.tokenizer_json import ids_of
from protocol.runtime.model_files import WEIGHT_FILES, model_folder
from protocol.runtime.settings import BLOCK_TOKENS
from protocol.wire.errors import AdapterRefused, BadRequest

logger = logging.getLogger(__name__)

HEADS = ("eagle", "medusa", "mtp", "nextn", "hydra", "speculator")
"""Parts of the architecture names of heads; only those in `EAGLE3` are supported."""

OWN_HEAD = re.compile(r"(^|\.)mtp(_layers)?\.|\.(enorm|hnorm|eh_proj|shared_head)\.")
"""Tensor names of a head in a base's own checkpoint: of Qwen3.5 and MiMo, of DeepSeek-V3 and GLM-4.5."""

KV_PARTS = 8
"""The draft model gets 1 / KV_PARTS of the memory for keys and values: it drafts for few sequences at once."""


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """A loaded draft model, before its cache is allocated."""

    model: BaseModel
    payoff: Payoff = field(default_factory=Payoff)

    def allocate(self, num_bytes: int, config: EngineConfig, vocab_size: int) -> DraftModel:
        """Return the draft model with as many blocks as fit `num_bytes`, at most as many as drafting can use.

        config, vocab_size: the base engine's. Raises BadRequest if no block fits or the engine computes the model
        wrongly.
        """
        block_bytes = sum(layer.block_bytes(self.model.cache_dtype) for layer in self.model.layers)
        num_blocks = _num_blocks(num_bytes, block_bytes, config)
        Runner(self.model, num_blocks).check()
        self.payoff.repeats = config.num_states > 0
        return DraftModel(self.model, num_blocks, vocab_size, config.limits.max_step_tokens, self.payoff)

    def keep_answers(self) -> None:
        """See `BaseModel`."""
        self.model.keep_answers()


@dataclass(frozen=True, slots=True)
class LoadedHead:
    """A loaded head of the base, before its cache is allocated."""

    head: BaseHead
    payoff: Payoff = field(default_factory=Payoff)

    def allocate(self, num_bytes: int, config: EngineConfig, vocab_size: int) -> DraftHead:
        """Return the head with its blocks, like `LoadedDraft.allocate`."""
        limits, num_blocks = config.limits, _num_blocks(num_bytes, self.head.block_bytes, config)
        self.head.allocate(num_blocks)
        self.payoff.repeats = config.num_states > 0
        most = limits.max_draft_step_tokens
        return DraftHead(self.head, num_blocks, vocab_size, limits.max_step_tokens, self.payoff, most)

    def keep_answers(self) -> None:
        """Do nothing: there are no answers of a transformers model to cache."""


def _num_blocks(num_bytes: int, block_bytes: int, config: EngineConfig) -> int:
    most = config.limits.max_draft_step_tokens // 2 * -(-config.max_model_len // BLOCK_TOKENS)
    num_blocks = min(num_bytes // block_bytes, most)
    if not num_blocks:
        raise BadRequest(
            f"kv_cache_bytes leaves the draft model {num_bytes} bytes, one part in {KV_PARTS}, and a block of its "
            f"keys and values has {block_bytes}"
        )
    logger.info("KV cache for %d tokens of the draft model", num_blocks * BLOCK_TOKENS)
    return num_blocks


def load_draft_model(
    model: str, tokenizer: str | None, base: BaseModel, impl: ops.Impl | None, base_folder: Path | None = None
) -> LoadedDraft | LoadedHead:
    """Load a draft model or a head. model: a folder or a Hub id.

    tokenizer: the base's tokenizer.json, None without one. impl: the base's. base_folder: the base's own folder; if
    `model` names it, its own head (MTP) drafts. Raises BadRequest, which names the model and the problem.
    """
    try:
        folder = model_folder(model, WEIGHT_FILES)
        config = read_config(folder)
        name = next(iter(getattr(config, "architectures", None) or ()), config.model_type)
        if name in EAGLE3:
            return LoadedHead(load_head(folder, config, base, impl))
        if any(kind in name.lower() for kind in HEADS):
            raise BadRequest(f"it is a head of the kind {name}; served is {EAGLE3[0]}")
        own_head = _own_head(folder) if base_folder is not None and folder.resolve() == base_folder.resolve() else ""
        if own_head.startswith(PREFIX):
            return LoadedHead(load_mtp(folder, base, impl))
        if own_head:
            raise BadRequest(f"it is the base, whose own head for further tokens ({own_head}) is not served")
        if task_of(config) != "generate" or has_no_lm_head(name):
            raise BadRequest(f"it is no causal language model, but {name}")
        check_vocabulary(tokenizer, folder)
        loaded = load_model(folder, base.device, base.dtype, impl, keeps_answers=True)
        check_layers(loaded)
    except (BadRequest, AdapterRefused) as error:
        raise BadRequest(f"draft_model is {model}: {error.message}") from error
    except UNREADABLE as error:
        raise BadRequest(f"draft_model is {model}: it cannot be read: {one_line(error)}") from error
    return LoadedDraft(loaded)


def _own_head(folder: Path) -> str:
    """Return the name of a tensor of the MTP head in a base's folder, "" if it has none."""
    for file in filter(Path.is_file, weight_files(folder)):
        with safe_open(file, framework="pt") as opened:
            names: list[str] = [*opened.keys()]
        if found := next(filter(OWN_HEAD.search, names), ""):
            return found
    return ""


def check_layers(model: BaseModel) -> None:
    """Raise BadRequest for a model that cannot roll back a token: entries of wrong drafts would stay in its cache."""
    if model.passes is not None:
        raise BadRequest("its sequences run unbatched, and their caches cannot roll back a token")
    if model.mixers.calls:
        raise BadRequest("its layers keep states, which cannot roll back a token")


def check_vocabulary(tokenizer: str | None, folder: Path) -> None:
    """Raise BadRequest unless a folder's tokens have the same ids as the base's; the error names one that differs.

    tokenizer: the base's tokenizer.json. How texts are tokenized may differ, since the draft model reads only tokens.
    """
    file = folder / TOKENIZER
    if tokenizer is None or not file.is_file():
        who = "the base" if tokenizer is None else "it"
        raise BadRequest(f"{who} has no {TOKENIZER}, so that their vocabularies cannot be compared")
    try:
        base, own = ids_of(tokenizer), ids_of(file.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRequest(f"its {TOKENIZER} is not in UTF-8: {error}") from error
    different = sorted(base.items() ^ own.items(), key=lambda item: (item[1], item[0]))
    if not different:
        return
    token = different[0][0]
    others = len({text for text, _ in different}) - 1
    raise BadRequest(
        f"its vocabulary is not the base's: token {token!r} has the id {own.get(token, 'none')}, in the base's "
        f"{base.get(token, 'none')}; so it is with {others} more"
    )
