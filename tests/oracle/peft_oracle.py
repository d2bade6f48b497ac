"""The oracle: a Hugging Face model and PEFT, one request at a time; and an engine with the same base and adapters."""

from __future__ import annotations

import contextlib
import copy
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import transformers_weight_conversion
from safetensors.torch import save
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gpu_worker.adapters.loader.fetch import FetchedAdapter
from gpu_worker.adapters.packing.expert_rows import expert_sites
from gpu_worker.adapters.packing.packer import row_sites
from gpu_worker.adapters.packing.rows import PackedRows, RowPacker
from gpu_worker.build import build_engine
from gpu_worker.drafting.load import LoadedDraft, LoadedHead
from gpu_worker.encoder.engine import EncoderEngine
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.runner import StepInputs
from gpu_worker.loading.checkpoint import takes_positions
from gpu_worker.model.model import BaseModel
from gpu_worker.model.prepare import prepare_model
from gpu_worker.planning.request import EngineRequest, TokenOutput
from protocol.runtime.settings import Settings
from protocol.wire.errors import LorafleetError
from protocol.wire.messages import Sampling

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TINY_VOCAB = 199
MLP = ("gate_proj", "up_proj", "down_proj")
FAMILY_OF_TYPE: dict[str, str] = transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN  # pyright: ignore[reportPrivateImportUsage]
"""PEFT's table: model type -> the type by whose rules it converts experts."""


@dataclass(frozen=True, slots=True)
class Lora:
    """The description of a random adapter, in which no matrix is zero."""

    rank: int
    targets: tuple[str, ...] = (*ATTENTION, *MLP)
    options: dict[str, Any] = field(default_factory=dict)  # further LoraConfig fields


class Oracle:
    """A base model in fp32 and adapters by name; "" is the base."""

    def __init__(self, base: PreTrainedModel, loras: dict[str, Lora], *, scale: float) -> None:
        """scale: standard deviation of the adapter matrices times sqrt(rank)."""
        self.untouched = copy.deepcopy(base)
        self.names = ["", *loras]
        self._model: Any = base
        self._files: dict[str, FetchedAdapter] = {}
        self._greedy: dict[tuple[str, bytes, int, float], list[int]] = {}  # results of `greedy`
        generator = torch.Generator().manual_seed(99)
        for name, lora in loras.items():
            options = {"lora_alpha": 2 * lora.rank, **lora.options}
            config = LoraConfig(r=lora.rank, target_modules=list(lora.targets), task_type="CAUSAL_LM", **options)
            if isinstance(self._model, PeftModel):
                self._model.add_adapter(name, config)
            else:
                self._model = get_peft_model(base, config, adapter_name=name)
            with torch.no_grad():
                for parameter_name, parameter in self._model.named_parameters():
                    if f".{name}." in parameter_name:
                        parameter.normal_(0.0, scale / lora.rank**0.5, generator=generator)
            self._files[name] = saved_files(self._model, config, adapter_name=name)
        self._model.eval()

    def round_rows(self) -> None:
        """Let PEFT compute with the values that int8 rows represent. Engines still fetch the unrounded adapters."""
        round_rows(self._model)

    def fetch(self, name: str) -> FetchedAdapter:
        return self._files[name]

    def greedy(self, name: str, prompt: np.ndarray, num_tokens: int, *, scale: float = 1.0) -> list[int]:
        """Return one adapter's greedy continuation, computed alone and cached. scale: multiplies the adapter's own."""
        key = (name, prompt.tobytes(), num_tokens, scale)
        if key not in self._greedy:
            self._greedy[key] = self.generate(name, prompt, num_tokens, scale=scale)[0]
        return [*self._greedy[key]]

    def generate(
        self, name: str, prompt: np.ndarray, num_tokens: int, *, scale: float = 1.0
    ) -> tuple[list[int], torch.Tensor]:
        """Return the greedy continuation under one adapter, computed alone, and its logits [num_tokens, V]."""
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        options: dict[str, Any] = {
            "attention_mask": torch.ones_like(ids), "max_new_tokens": num_tokens, "do_sample": False,
            "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True,
            "forced_eos_token_id": None,
        }  # fmt: skip
        with torch.inference_mode(), self._under(name, scale) as model:
            out = model.generate(input_ids=ids, **options)
        return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)

    def logits(self, name: str, ids: np.ndarray) -> torch.Tensor:
        """Return the logits [T, V] of a text under one adapter, computed alone."""
        with torch.inference_mode(), self._under(name) as model:
            inputs = {"input_ids": torch.from_numpy(ids.astype(np.int64))[None]}
            if takes_positions(self.untouched):
                inputs["position_ids"] = torch.arange(len(ids))[None]
            return model(**inputs, use_cache=False).logits[0]

    @contextlib.contextmanager
    def _under(self, name: str, scale: float = 1.0) -> Iterator[Any]:
        if name:
            self._model.set_adapter(name)
        layers = [layer for layer in self._model.modules() if isinstance(layer, LoraLayer) and name in layer.scaling]
        own = [layer.scaling[name] for layer in layers]
        for layer in layers:
            layer.scaling[name] *= scale
        with (
            contextlib.nullcontext()
            if name or not isinstance(self._model, PeftModel)
            else self._model.disable_adapter()
        ):
            try:
                yield self._model
            finally:
                for layer, before in zip(layers, own, strict=True):
                    layer.scaling[name] = before

    def engine(
        self, tokenizer: Tokenizer | None = None, *, draft: LoadedDraft | None = None, **settings: Any
    ) -> Engine:
        """Return an engine on a copy of the base that fetches these adapters."""
        impl = "reference" if settings.get("kernels") == "reference" else None
        model = prepare_model(copy.deepcopy(self.untouched), frozenset(), impl)
        text = tokenizer.to_str() if tokenizer else None
        return packed_engine(model, oracle_settings(**settings), self.fetch, text, draft)


def saved_files(model: Any, config: PeftConfig, **options: Any) -> FetchedAdapter:
    """Return the files that PEFT saves for an adapter of a model. options: of `get_peft_model_state_dict`."""
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False, **options)
    weights = save({key: tensor.contiguous() for key, tensor in tensors.items()})
    return FetchedAdapter(json.loads(json.dumps(config.to_dict(), default=list)), weights)


def oracle_settings(**given: Any) -> Settings:
    """Return the settings of an engine over a tiny model."""
    return Settings(**{"model": "oracle", "adapter_pool_bytes": 64 << 20, "kv_cache_bytes": 64 << 20, **given})


def round_rows(model: torch.nn.Module) -> None:
    """Round PEFT's LoRA on linear layers in place: each rank row to multiples of 1/127 of its maximum."""
    for layer in model.modules():
        linear = not isinstance(layer, ParamWrapper) or isinstance(layer.get_base_layer(), torch.nn.Linear)
        if isinstance(layer, LoraLayer) and linear:
            matrices: list[torch.Tensor] = [
                *(part.get_parameter("weight").data for part in layer.lora_A.values()),
                *(part.get_parameter("weight").data.T for part in layer.lora_B.values()),
            ]
            for rows in matrices:
                step = rows.abs().amax(1, keepdim=True) / 127
                rows.copy_((rows / step).round() * step)


def packed_engine(
    model: BaseModel,
    settings: Settings,
    fetch: Callable[[str], FetchedAdapter],
    tokenizer: str | None = None,
    draft: LoadedDraft | LoadedHead | None = None,
) -> Engine:
    """Return an engine that gets plain adapters packed, as from the loader process."""
    packers: list[RowPacker] = []

    def fetch_rows(name: str) -> FetchedAdapter | PackedRows:
        files = fetch(name)
        return packers[0].pack(files.config, memoryview(files.weights), bytearray) or files

    engine, served = build_engine(model, settings, fetch_rows, tokenizer, fetch, draft)
    int8 = settings.lora_dtype == "int8"
    packers.append(RowPacker(row_sites(model.sites, expert_sites(model.adaptable.experts), int8=int8), served))
    return engine


class Asked:
    """An engine's outputs, by request id."""

    def __init__(self) -> None:
        self.ids: dict[str, list[int]] = {}
        self.logprobs: dict[str, bytes] = {}
        self.prompt_logprobs: dict[str, bytes] = {}
        self.finish: dict[str, TokenOutput] = {}
        self.most_adapters_in_a_step = 0

    def take(self, output: TokenOutput) -> None:
        ids = self.ids.setdefault(output.rid, [])
        assert output.rid not in self.finish, "an ended request must stay silent"
        ids += output.ids
        self.logprobs[output.rid] = self.logprobs.get(output.rid, b"") + output.logprobs
        if output.prompt_logprobs:
            assert output.rid not in self.prompt_logprobs
            self.prompt_logprobs[output.rid] = output.prompt_logprobs
        if output.finish:
            self.finish[output.rid] = output


def watch(engine: Engine, look: Callable[[Any, torch.Tensor], object]) -> Any:
    """Call `look` with the inputs and the logits of every step. Returns the original function."""
    run = engine.runner.run

    def watched(inputs: StepInputs) -> torch.Tensor:
        logits = run(inputs)
        look(inputs, logits)
        return logits

    engine.runner.run = watched
    return run


def warm(engine: Engine | EncoderEngine, names: Iterable[str]) -> None:
    """Load adapters into the pool, so that load times do not decide how many run together."""
    loaded = threading.Event()
    engine.wake_with(loaded.set)
    wanted = {name for name in names if name}
    for name in wanted:
        engine.prefetch(name)
    while not wanted <= set(engine.adapters.resident):
        assert loaded.wait(timeout=60), "no adapter arrived"
        loaded.clear()
        assert not engine.adapters.poll()


def ask(engine: Engine, requests: Iterable[EngineRequest], after_step: Callable[[int], object] | None = None) -> Asked:
    """Run requests to their ends. after_step: called with the number of steps run so far."""
    loaded = threading.Event()
    engine.adapters.on_loaded = engine.grammars.on_ready = loaded.set
    asked = Asked()
    for request in requests:
        engine.add(request)
    num_steps = 0
    while engine.has_work:
        outputs = engine.step()
        num_steps += 1
        slots = {seq.slot for seq in engine.batcher.running if seq.slot >= 0}
        asked.most_adapters_in_a_step = max(asked.most_adapters_in_a_step, len(slots))
        for output in outputs:
            asked.take(output)
        if after_step is not None:
            after_step(num_steps)
        if not engine.can_step and engine.has_work:
            assert loaded.wait(timeout=60), "no adapter arrived"
            loaded.clear()
    engine.check_integrity()
    return asked


def refusal(engine: Engine, request: EngineRequest) -> LorafleetError:
    """Return why a request is refused."""
    error = ask(engine, [request]).finish[request.rid].error
    assert error is not None
    return error


def greedy_request(rid: str, name: str, prompt: np.ndarray, num_tokens: int, **fields: Any) -> EngineRequest:
    sampling = Sampling(temperature=0.0, ignore_eos=True)
    return EngineRequest(rid, 1, name, prompt.astype(np.int32), sampling, num_tokens, **fields)


def vary_norms(model: PreTrainedModel) -> None:
    """Change the norm vectors of a random model: ones and zeros would hide how they are used."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape)


def random_llama(*, std: float, **fields: Any) -> LlamaForCausalLM:
    """Return a random fp32 Llama. std: standard deviation of its weights, large enough that outputs vary."""
    config = LlamaConfig(
        initializer_range=std, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, **fields
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        vary_norms(model)
    return model


def tiny_llama() -> LlamaForCausalLM:
    """Return a random Llama of 2 layers."""
    return random_llama(
        std=0.2, vocab_size=TINY_VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip


def sixteen_loras(*, head: bool) -> dict[str, Lora]:
    """Return 16 adapters of mixed ranks, targets and options. head: whether some of them adapt the head."""
    ranks = (1, 3, 8, 16, 64)
    with_head = (*ATTENTION, "lm_head") if head else ATTENTION
    targets = ((*ATTENTION, *MLP), ("q_proj", "v_proj"), MLP, ("o_proj", "down_proj"), with_head, ("gate_proj",))
    loras = {f"a{i}": Lora(ranks[i % 5], targets[i % 6]) for i in range(13)}
    loras["rslora"] = Lora(16, options={"use_rslora": True, "lora_alpha": 4})
    loras["some-layers"] = Lora(8, options={"layers_to_transform": [1]})
    loras["patterns"] = Lora(
        8, options={"rank_pattern": {"q_proj": 3, "down_proj": 17}, "alpha_pattern": {"v_proj": 40}}
    )
    return loras


def prompts(num: int, vocab: int, lengths: Sequence[int] = (3, 17, 32, 45, 70)) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(vocab, size=lengths[i % len(lengths)]).astype(np.int32) for i in range(num)]
