"""Reads a model folder as a Hugging Face model; errors are one line."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from gpu_worker.light_imports import drawing_nothing_on_meta
from gpu_worker.loading.mapped import map_model
from gpu_worker.quantised.index import MappedWeights, is_quantised_folder
from gpu_worker.quantised.modules import fill_model, parameters_on_meta
from gpu_worker.quantised.panels import KeptPanels
from protocol.wire.errors import BadRequest
from protocol.wire.messages import Task

MAX_NAMED = 3
MAX_LINE = 400

UNSERVED_HEADS = ("SequenceClassification", "QuestionAnswering", "MultipleChoice", "NextSentencePrediction")

CLASSES: Mapping[Task, Any] = {
    "generate": AutoModelForCausalLM,
    "embed": AutoModel,
    "classify": AutoModelForTokenClassification,
    "score": AutoModelForSequenceClassification,
}
"""The class that loads a model for its task."""

QUANTISATIONS = {*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes"}

UNREADABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError, AssertionError,
    ArithmeticError, SafetensorError, StrictDataclassError,
)  # fmt: skip
"""Errors that transformers and quantization libraries raise for files they cannot use."""

CANNOT_RUN = (
    TypeError, ValueError, LookupError, AttributeError, RuntimeError, NotImplementedError, ImportError, AssertionError
)  # fmt: skip
"""Errors raised by models that need images, a mask, their own cache, or kernels missing on this machine."""


def read_model(
    folder: Path, device: torch.device, dtype: torch.dtype, auto: Any = None, *, may_lack_head: bool = False
) -> PreTrainedModel:
    """Load a folder's model onto a device, in eval mode, with the head for its task (see `task_of`).

    dtype: for weights that are not quantized. auto: a class to use instead of the task's. may_lack_head: whether the
    language model's head may be missing, which is then an identity. Raises BadRequest, in one line.
    """
    config = read_config(folder)
    module, missing = _read(folder, config, auto or CLASSES[task_of(config)], device, dtype)
    if may_lack_head and missing and set(missing) <= _head_tensors(module):
        module.set_output_embeddings(torch.nn.Identity())
    else:
        _refuse_tensors(folder, "lack", missing)
    return module


def read_headless(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[PreTrainedModel, list[str]]:
    """Load an encoder as a classifier of texts. Return it, and the tensors of its head that the folder lacks.

    Raises like `read_model`; also BadRequest for a model that is not an encoder or lacks other tensors.
    """
    config = read_config(folder)
    if not is_encoder(config) or type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise BadRequest(f"model type {config.model_type} has no class for sequence classification as an encoder")
    module, missing = _read(folder, config, CLASSES["score"], device, dtype)
    body = f"{module.base_model_prefix}."
    _refuse_tensors(folder, "lack", (name for name in missing if name.startswith(body)))
    return module, missing


def _read(
    folder: Path, config: PreTrainedConfig, auto: Any, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, list[str]]:
    """Load a model with a class of transformers. Return it, and its tensors that the folder lacks."""
    if is_quantised_folder(folder):
        return _read_blocks(folder, config, auto, device, dtype), []
    quantised = quantisation_of(config)
    if quantised and quantised not in QUANTISATIONS:  # transformers would read the weights as unquantized
        raise BadRequest(f"the model in {folder} is quantised with {quantised}, unknown to transformers")
    if quantised == "bitsandbytes":  # it warns in every layer of every step about rounded activations
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Quantized weights must be loaded onto their device; others come through host memory, whatever accelerate prefers.
    place: dict[str, Any] = {"device_map": {"": device}} if quantised else {}
    if auto is AutoModel and _has_pooler(config):
        place["add_pooling_layer"] = False  # only for the pretraining task, and missing in many checkpoints
    try:
        may_map = device.type == "cpu" and auto is AutoModelForCausalLM and not quantised
        if may_map and (mapped := map_model(folder, config, dtype)) is not None:
            return mapped, []
        with drawing_nothing_on_meta():
            loaded: Any = auto.from_pretrained(
                folder, config=config, dtype=dtype, attn_implementation="eager", trust_remote_code=False,
                output_loading_info=True, ignore_mismatched_sizes=True, **place,
            )  # fmt: skip
    except UNREADABLE as error:
        how = f", quantised with {quantised}," if quantised else ""
        raise BadRequest(f"the model in {folder}{how} cannot be loaded: {one_line(error)}") from error
    module, info = loaded
    # Transformers fills mismatched and missing tensors with random numbers, and only warns.
    _refuse_tensors(folder, "have other shapes for", (name for name, *_ in info["mismatched_keys"]))
    if not quantised:
        torch.nn.Module.to(module, device)
    return module.eval().requires_grad_(False), sorted(info["missing_keys"])


def _read_blocks(
    folder: Path, config: PreTrainedConfig, auto: Any, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """Load a model whose weights stay in quantized blocks (see `gpu_worker.quantised`)."""
    if device.type != "cpu":
        raise BadRequest(f"the weights in {folder} are in GGUF's blocks, which are served on a CPU only: --device cpu")
    if auto is not AutoModelForCausalLM:
        raise BadRequest(f"the weights in {folder} are in GGUF's blocks, which are served for causal LMs only")
    weights = MappedWeights(folder)
    with parameters_on_meta():
        module = auto.from_config(config, attn_implementation="eager", dtype=dtype)
    with KeptPanels(folder, folder / weights.index.file) as panels:
        return fill_model(module, weights, panels, dtype)


def _head_tensors(module: PreTrainedModel) -> set[str]:
    """Return the names of the tensors of a language model's head."""
    head = module.get_output_embeddings()
    name = next((name for name, child in module.named_modules() if child is head), "")
    return {f"{name}.{own}" for own, _ in head.named_parameters()} if name and head is not None else set()


def _refuse_tensors(folder: Path, what: str, found: Iterable[str]) -> None:
    names = sorted(found)
    if names:
        shown = ", ".join(names[:MAX_NAMED]) + (" …" if len(names) > MAX_NAMED else "")
        raise BadRequest(f"the weights in {folder} {what} {len(names)} of the model's tensors: {shown}")


def read_config(folder: Path) -> PreTrainedConfig:
    """Read a folder's config.json. Raises BadRequest unless it is a causal LM or encoder known to transformers."""
    try:
        raw = json.loads((folder / "config.json").read_text())
        model_type = raw.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise BadRequest(f"{folder / 'config.json'} is not a readable model config: {one_line(error)}") from error
    if model_type not in CONFIG_MAPPING:
        raise BadRequest(f"model type {model_type!r} is not known to transformers {transformers.__version__}")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except UNREADABLE as error:
        raise BadRequest(f"{folder / 'config.json'} is not a valid {model_type} config: {one_line(error)}") from error
    if task_of(config) == "generate" and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise BadRequest(f"model type {model_type} is not a causal language model, nor an encoder that is served")
    return config


def task_of(config: PreTrainedConfig) -> Task:
    """Return a model's task, judging by its config. Raises BadRequest for an unsupported head.

    Every decoder counts as generating text: see `headless.py` for those without a language model's head.
    """
    name = next(iter(getattr(config, "architectures", None) or ()), "")
    if name.endswith("ForTokenClassification") and type(config) in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        return "classify"
    of_texts = name.endswith("ForSequenceClassification") and type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if of_texts and is_encoder(config):
        return "score"
    if of_texts and is_decoder(config):
        return "generate"
    if name.endswith(tuple(f"For{head}" for head in UNSERVED_HEADS)):
        raise BadRequest(f"{name} is not served: of encoders embeddings and classification are")
    return "embed" if is_encoder(config) else "generate"


def is_encoder(config: PreTrainedConfig) -> bool:
    """Return whether a model attends in both directions, judging by its config."""
    name = next(iter(getattr(config, "architectures", None) or ()), "")
    decodes = name.endswith(("ForCausalLM", "LMHeadModel")) or getattr(config, "is_decoder", False)
    is_both = getattr(config, "is_encoder_decoder", False)
    return not decodes and not is_both and type(config) in MODEL_FOR_MASKED_LM_MAPPING


def is_decoder(config: PreTrainedConfig) -> bool:
    """Return whether a model of this type attends in one direction only."""
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING


def head_dim_of(config: PreTrainedConfig) -> int:
    """Return the dimension of an attention head; 0 if the config does not say, or layers differ."""
    text = config.get_text_config()
    try:
        own = getattr(text, "head_dim", None)
    except RuntimeError:  # how transformers reports that layers differ (Gemma 4)
        return 0
    if not own:
        width, heads = getattr(text, "hidden_size", None), getattr(text, "num_attention_heads", None)
        own = width // heads if isinstance(width, int) and isinstance(heads, int) and heads else 0
    return own if isinstance(own, int) else 0


def tokenizer_types(folder: Path) -> bool:
    """Return whether a folder's tokenizer produces type ids for pairs of texts. Raises BadRequest.

    True for the classes of BERT's family, and wherever `model_input_names` includes them.
    """
    try:
        names: list[str] = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).model_input_names
    except UNREADABLE as error:
        raise BadRequest(f"the tokenizer in {folder} cannot be read: {one_line(error)}") from error
    return "token_type_ids" in names


def _has_pooler(config: PreTrainedConfig) -> bool:
    model: Any = MODEL_MAPPING[type(config)]
    return "add_pooling_layer" in inspect.signature(model.__init__).parameters


def read_eos_ids(folder: Path, config: PreTrainedConfig) -> frozenset[int]:
    """Return the token ids that end a text, from the generation config and model config. Raises BadRequest."""
    found: set[int] = set()
    sources: list[Any] = [config, config.get_text_config()]
    if (folder / "generation_config.json").is_file():
        try:
            sources.append(GenerationConfig.from_pretrained(folder))
        except UNREADABLE as error:
            raise BadRequest(f"{folder / 'generation_config.json'} is not readable: {one_line(error)}") from error
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return frozenset(found)


def one_line(error: BaseException) -> str:
    """Return an error's text on one line, or its type if it has no text."""
    text = " ".join(str(error).split())
    return (text if len(text) <= MAX_LINE else f"{text[:MAX_LINE]} …") or type(error).__name__


def refusal(module: PreTrainedModel, reasons: list[str]) -> BadRequest:
    """Return the error for an unsupported model; each reason is a noun phrase."""
    return BadRequest(f"model type {module.config.model_type} cannot be served: it has {'; '.join(reasons)}")


CACHE_NAMES = ("cache", "past_key_values")
"""Argument names of a cache object in transformers, newest first."""


def takes_positions(module: PreTrainedModel) -> bool:
    """Return whether a model's forward takes the tokens' positions."""
    return "position_ids" in inspect.signature(module.forward).parameters


@contextmanager
def refuse_what_cannot_run(module: PreTrainedModel) -> Iterator[None]:
    """Raise BadRequest if running the model in the block fails as models do that need more than token ids."""
    try:
        yield
    except CANNOT_RUN as error:
        method, what = quantisation_of(module.config), "a forward pass that needs more than tokens"
        what = f"layers quantised with {method} that cannot run here" if method else what
        raise refusal(module, [f"{what}: {one_line(error)}"]) from error


def quantisation_of(config: PreTrainedConfig) -> str:
    """Return the quantization method of a model's weights, "" if they are not quantized."""
    quantised: Any = getattr(config, "quantization_config", None)
    if not quantised:
        return ""
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
    return str(getattr(method, "value", method))
