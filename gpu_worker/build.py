"""Build a running engine from settings: load the model and size its caches."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from msgspec import structs

from gpu_worker.adapters.cache import AdapterCache
from gpu_worker.adapters.loader.fetch import FetchedAdapter
from gpu_worker.adapters.merges import NUM_MERGERS, MergeWatch
from gpu_worker.adapters.packing.expert_rows import expert_sites
from gpu_worker.adapters.packing.merging import check_bytes, merge_adapters
from gpu_worker.adapters.packing.packer import HostAdapter, Packer, name_of, row_sites
from gpu_worker.adapters.packing.rows import PackedRows, RowSite
from gpu_worker.adapters.weights import PoolWeights
from gpu_worker.cuda.capture import CudaRecorder
from gpu_worker.cuda.claim import claim_gpu
from gpu_worker.cuda.graphs import Unrecordable
from gpu_worker.cuda.warm_up import run_steps, warm_up_steps
from gpu_worker.cuda.workspace import CudaMeter, workspace_bytes
from gpu_worker.drafting.load import KV_PARTS, LoadedDraft, LoadedHead, load_draft_model
from gpu_worker.encoder.engine import EncoderConfig, EncoderEngine
from gpu_worker.encoder.model import EncoderModel, prepare_encoder
from gpu_worker.engine.engine import Engine, EngineConfig
from gpu_worker.engine.engine_thread import EngineThread
from gpu_worker.loading.checkpoint import (
    quantisation_of,
    read_config,
    read_headless,
    read_model,
    task_of,
    tokenizer_types,
)
from gpu_worker.loading.weights import weights_hash
from gpu_worker.memory import CacheBytes, GiB, free_bytes, share_out
from gpu_worker.model.compiled import compiling, warm
from gpu_worker.model.kv_dtype import choose_kv_dtype
from gpu_worker.model.model import BaseModel, choose_device, choose_dtype, choose_isa, multiplies_bfloat16
from gpu_worker.model.prepare import load_model
from gpu_worker.planning.batcher import MAX_PROMPT_ROWS
from gpu_worker.planning.policy import BatchLimits
from gpu_worker.quantised.index import is_quantised_folder
from gpu_worker.quantised.quantise import quantised_folder
from gpu_worker.served import served_model
from gpu_worker.tasks.headless import has_no_lm_head
from gpu_worker.tasks.labels import folder_activation
from gpu_worker.tasks.pooling import read_pooling
from lora_kernels import ops
from peft_adapters.recipe import merge_of
from peft_adapters.texts.files import TOKENIZER
from peft_adapters.texts.tokenizer_json import BaseTokens, parts_of
from protocol.runtime.model_files import WEIGHT_FILES, model_folder, served_name
from protocol.runtime.settings import BLOCK_TOKENS, Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest

logger = logging.getLogger(__name__)


STATES_PER_SEQ = 4
"""State slots for each sequence that may run, memory permitting: two for a grammar, two for the prefix cache."""

ROUNDING_SETS = frozenset({"avx2", "avx2_vnni", "avx512", "avx512_vnni"})
"""Instruction sets whose products of int8 inputs are faster than those of exact ones (docs/measured/kernels.md)."""

LONGEST_WITHOUT_LIMIT = 1 << 17
"""Maximum tokens of a request if the model names no limit and stores nothing per token."""


Fetch = Callable[[str], FetchedAdapter | PackedRows]
"""Return an adapter's files by digest, or rows packed from them. Called in loader threads; may block."""

FetchFiles = Callable[[str], FetchedAdapter]
"""Return an adapter's files by digest. Called in loader threads; may block."""

Describe = Callable[[list[RowSite], m.ServedModel], object]
"""Callback that receives the sites for which adapters are packed, and the served model."""


def load_engine(
    settings: Settings, fetch: Fetch, describe: Describe | None = None, fetch_files: FetchFiles | None = None
) -> tuple[EngineThread, m.ServedModel]:
    """Load the model and return its engine, whose thread is not started, and its description. Takes seconds to minutes.

    fetch, fetch_files: return adapters by digest; see `build_engine` for the second. describe: called once, before the
    return. Raises BadRequest, Internal.
    """
    started = time.monotonic()
    if settings.gpus and settings.device != "cpu":
        gpu = claim_gpu([gpu.strip() for gpu in settings.gpus.split(",")], settings.gpu_locks or settings.data / "gpus")
        logger.info("this worker uses GPU %s of %s", gpu, settings.gpus)
    device = choose_device(settings.device)
    refuse_unless_on_cpu(settings, device)
    if device.type == "cpu":
        torch.set_num_threads(settings.threads or max(1, torch.get_num_threads() // max(1, settings.workers)))
    ops.fix_sums(settings.deterministic)
    impl: ops.Impl | None = "reference" if settings.kernels == "reference" else None
    isa = choose_isa(settings.kernels, device)
    folder = given = model_folder(settings.model, WEIGHT_FILES)
    if settings.quantization != "none":
        folder = _quantise(folder, device, settings)
    headless = settings.task == "score"
    task = "score" if headless else task_of(read_config(folder))
    multiplies = multiplies_bfloat16(device)
    dtype, reason = choose_dtype(settings.dtype, multiplies=multiplies, isa=isa, is_encoder=task != "generate")
    tokenizer_file = folder / TOKENIZER
    tokenizer = tokenizer_file.read_text() if tokenizer_file.is_file() else None
    if task == "generate":
        model = load_model(
            folder, device, dtype, impl, score_tokens=settings.score_tokens, compiled=settings.compile,
            keeps_answers=True, rounds_inputs=rounds_inputs(settings, isa),
        )  # fmt: skip
        if model.rounds_inputs:
            reason += "; quantised layers multiply inputs in int8"
        draft = load_draft_model(settings.draft_model, tokenizer, model, impl, given) if settings.draft_model else None
        engine, served = build_engine(model, settings, fetch, tokenizer, fetch_files, draft)
        model.keep_answers()
        if draft is not None:
            draft.keep_answers()
        gc.collect()  # modules with packed weights form reference cycles, and hold the mapped files
        room = f"KV cache for {engine.blocks.num_blocks * BLOCK_TOKENS} tokens in {name_of(model.cache_dtype)}, "
    elif settings.quantize_activations or settings.draft_tokens:
        what = "quantize_activations is on" if settings.quantize_activations else _speculates(settings)
        raise BadRequest(f"{what}, which is served for causal LMs only: leave it out")
    else:
        pooling = read_pooling(folder) if task == "embed" else None
        if headless:
            module, missing = read_headless(folder, device, dtype)
        else:
            module, missing = read_model(folder, device, dtype), []
        has_types = task != "score" or tokenizer_types(folder)
        model = prepare_encoder(module, task, impl, pooling, missing, has_types=has_types)
        engine, served = build_encoder_engine(model, settings, fetch, fetch_files)
        room = f"pooled by {pooling.mode}, " if pooling is not None else ""
    if served.does("score") and served.labels:
        own = folder_activation(folder)
        served = structs.replace(served, pair_activation=served.pair_activation if own is None else own)
    parts = parts_of(tokenizer) if tokenizer is not None else {}
    served = structs.replace(
        served, dtype_reason=reason, kernels=isa, tokenizer=parts, weights=weights_hash(given),
        draft_model=served_name(settings.draft_model, "") if settings.draft_model else "",
    )  # fmt: skip
    if describe is not None:
        places = row_sites(model.sites, expert_sites(model.adaptable.experts), int8=settings.lora_dtype == "int8")
        describe(places, served)
    logger.info(
        "%s in %s (%s) on %s: %sat most %d tokens per request, adapter pool %.1f MiB; ready in %.1f s",
        served.name, served.dtype, reason, device, room, served.max_model_len,
        engine.adapters.pool.total_bytes / (1 << 20), time.monotonic() - started,
    )  # fmt: skip
    return EngineThread(engine), served


def _quantise(folder: Path, device: torch.device, settings: Settings) -> Path:
    """Return the folder of the model quantized as settings ask. Raises BadRequest where that is not supported."""
    config, given = read_config(folder), f"quantization is {settings.quantization}"
    assert settings.quantization != "none"
    if device.type != "cpu":
        raise BadRequest(f"{given}, which is served on a CPU only; the device is {device.type}")
    if is_quantised_folder(folder) or quantisation_of(config):
        raise BadRequest(f"{given}, but the weights in {folder} are quantised already")
    name = next(iter(getattr(config, "architectures", None) or ()), "")
    if settings.task == "score" or task_of(config) != "generate" or has_no_lm_head(name):
        raise BadRequest(f"{given}, which is served for causal LMs only; this is {name or config.model_type}")
    return quantised_folder(folder, config, settings.quantization, settings.kept_models)


def build_engine(
    model: BaseModel,
    settings: Settings,
    fetch: Fetch,
    tokenizer: str | None = None,
    fetch_files: FetchFiles | None = None,
    draft: LoadedDraft | LoadedHead | None = None,
) -> tuple[Engine, m.ServedModel]:
    """Allocate the caches of a loaded model and build the engine.

    tokenizer: contents of the model's tokenizer.json, None without one. fetch_files: required if `fetch` may return
    rows, which cannot be merged. draft: the draft model or head, if any. Raises BadRequest for contradictory settings,
    or a model that the engine computes wrongly.
    """
    with compiling() if settings.compile else nullcontext():  # room is measured with steps, which compile
        return _built(model, settings, fetch, tokenizer, fetch_files, draft)


def _built(
    model: BaseModel,
    settings: Settings,
    fetch: Fetch,
    tokenizer: str | None,
    fetch_files: FetchFiles | None,
    draft: LoadedDraft | LoadedHead | None,
) -> tuple[Engine, m.ServedModel]:
    model.kv_dtype = choose_kv_dtype(model, settings.kv_cache_dtype)
    memory = share_out(room_for_caches(model, settings), settings, on_cpu=model.device.type == "cpu")
    draft_bytes = memory.kv // KV_PARTS if draft is not None else 0
    config = engine_config(model, settings, memory.kv - draft_bytes)
    served = served_model(model, config.max_model_len, settings)
    tokens = BaseTokens(tokenizer) if tokenizer is not None else None
    cache = adapter_cache(model, served, settings, memory, fetch, fetch_files, tokens)
    draft_model = draft.allocate(draft_bytes, config, model.vocab_size) if draft is not None else None
    engine = Engine(model, config, cache, tokens.table if tokens is not None else None, tokenizer, draft_model)
    if settings.deterministic:
        refuse_unless_fixed(engine)
    if settings.compile:
        warm(model)
    record_steps(engine, settings)
    return engine, served


def build_encoder_engine(
    model: EncoderModel, settings: Settings, fetch: Fetch, fetch_files: FetchFiles | None = None
) -> tuple[EncoderEngine, m.ServedModel]:
    """Build the engine of a loaded encoder. Arguments and errors are those of `build_engine`."""
    decoders = (settings.compile, settings.deterministic, settings.kv_cache_dtype != "auto")
    if any(decoders) or "on" in (settings.cuda_graphs, settings.overlap):
        raise BadRequest(
            "compile, deterministic, kv_cache_dtype, cuda_graphs and overlap are for models that generate text, "
            "not for encoders"
        )
    max_num_seqs, max_step_tokens = _step_sizes(model.device, settings)
    longest = model.max_positions or max_step_tokens
    if settings.max_model_len > longest:
        raise BadRequest(f"max_model_len is {settings.max_model_len}, the model supports {longest} tokens")
    config = EncoderConfig(
        max_num_seqs, max_step_tokens, settings.max_model_len or longest, max_slowdown=settings.max_slowdown,
        max_batch_slowdown=settings.max_batch_slowdown,
    )  # fmt: skip
    served = served_model(model, config.max_model_len, settings)
    memory = share_out(usable_bytes(model.device, settings), settings, on_cpu=model.device.type == "cpu")
    return EncoderEngine(model, config, adapter_cache(model, served, settings, memory, fetch, fetch_files)), served


def room_for_caches(model: BaseModel, settings: Settings) -> int:
    """Return the bytes available for caches. On a GPU: what the weights and the largest steps, which are run, leave.

    Raises BadRequest when nothing is left.
    """
    room = usable_bytes(model.device, settings)
    if model.device.type == "cpu":
        return room
    if model.passes is not None:  # unbatched sequences have caches of their own
        return int(room * 0.9)
    max_num_seqs, max_step_tokens = _step_sizes(model.device, settings)
    longest = settings.max_model_len or model.max_positions or max_step_tokens
    needed = workspace_bytes(
        model,
        CudaMeter(model.device),
        max_num_seqs=max_num_seqs,
        max_step_tokens=max_step_tokens,
        max_model_len=longest,
        max_prompt_rows=MAX_PROMPT_ROWS,
        has_graphs=settings.cuda_graphs != "off",
    )
    logger.info("the largest steps take %.1f MiB of %.1f MiB", needed / (1 << 20), room / (1 << 20))
    if needed >= room:
        raise BadRequest(
            f"the largest steps need {needed >> 20} MiB, and {room >> 20} MiB are left beside the weights: lower "
            f"max_step_tokens ({max_step_tokens}) or max_num_seqs ({max_num_seqs}), or raise gpu_memory_utilization "
            f"({settings.gpu_memory_utilization})"
        )
    return room - needed


def usable_bytes(device: torch.device, settings: Settings) -> int:
    """Return the bytes of a device that this worker may still use."""
    if device.type == "cpu":  # workers of one machine start together and share the free memory
        return free_bytes(device) // max(1, settings.workers)
    free, total = torch.cuda.mem_get_info(device)
    return max(0, free - int(total * (1 - settings.gpu_memory_utilization)))


def adapter_cache(
    model: BaseModel | EncoderModel,
    served: m.ServedModel,
    settings: Settings,
    memory: CacheBytes,
    fetch: Fetch,
    fetch_files: FetchFiles | None = None,
    tokens: BaseTokens | None = None,
) -> AdapterCache:
    """Allocate the adapter pool of a loaded model. tokens: the base's token table; the rest as in `build_engine`."""
    on_cpu, int8 = model.device.type == "cpu", settings.lora_dtype == "int8"
    host_bytes = settings.adapter_host_bytes or min(int(free_bytes(torch.device("cpu")) * 0.1), 2 * GiB)
    weights = PoolWeights(
        model.sites, model.shared, memory.pool, model.device, memory.extra, adaptable=model.adaptable, int8=int8
    )
    packer = Packer(model.sites, served, model.adaptable, int8)

    module_names = [name for name, _ in model.module.named_modules()]
    read_files = fetch_files or _files_only(fetch)

    def read(digest: str) -> HostAdapter:
        files = fetch(digest)
        if isinstance(files, PackedRows):
            adapter = packer.wrap(digest, files)
        else:
            adapter = packer.pack(digest, files.config, files.weights)
        if tokens is None or files.added is None:
            return adapter
        return replace(adapter, tokens=tokens.with_added(files.added))

    merge_bytes = free_bytes(torch.device("cpu")) // (2 * NUM_MERGERS * (max(1, settings.workers) if on_cpu else 1))

    def merge(digest: str, watch: MergeWatch) -> HostAdapter:
        recipe = merge_of(digest)
        assert recipe is not None, f"{digest:.40} is no merge"
        files: list[FetchedAdapter] = []
        for part in recipe.digests:
            watch.check()
            files.append(read_files(part))
            check_bytes(sum(len(file.weights) for file in files), merge_bytes)
        return merge_adapters(digest, recipe, files, packer, module_names, watch, merge_bytes)

    return AdapterCache(weights, read, host_bytes, merge=merge, merge_timeout_s=settings.merge_timeout_s)


def _files_only(fetch: Fetch) -> FetchFiles:
    def read_files(digest: str) -> FetchedAdapter:
        files = fetch(digest)
        assert isinstance(files, FetchedAdapter), "`fetch` returns rows, so that `fetch_files` is needed"
        return files

    return read_files


def rounds_inputs(settings: Settings, isa: str) -> bool | None:
    """Return whether inputs of quantized layers are rounded to int8; None: if the model has any.

    isa: the native CPU kernels' instruction set, "" if torch computes. Unless a setting says so, inputs are rounded
    with the sets whose products of such inputs are faster than exact ones, and only if sums need not be fixed.
    """
    if settings.quantize_activations is None and isa in ROUNDING_SETS and not settings.deterministic:
        return None
    return bool(settings.quantize_activations)


def refuse_unless_on_cpu(settings: Settings, device: torch.device) -> None:
    """Raise BadRequest if settings ask for int8 adapters or activations on a device without kernels for them."""
    if device.type == "cpu":
        return
    if settings.lora_dtype == "int8":
        raise BadRequest(f"lora_dtype is int8, which is served on a CPU only; the device is {device.type}")
    if settings.quantize_activations:
        raise BadRequest(f"quantize_activations is on, which is served on a CPU only; the device is {device.type}")


def refuse_unless_fixed(engine: Engine) -> None:
    """Raise BadRequest if other requests in a batch change a request's logits even with a fixed order of sums."""
    model, config = engine.model, engine.config
    if model.passes is not None:
        raise BadRequest("deterministic is on, but this model's sequences run unbatched, in chunks of any length")
    model.refuse_unless_fixed(config.num_blocks, config.num_states)


def warm_up(engine: Engine) -> None:
    """Run a step of every shape before the first request, so that no kernel is compiled while requests wait.

    Does nothing for a model whose sequences run unbatched: its steps use none of our kernels.
    """
    model, limits = engine.model, engine.config.limits
    if model.passes is not None:
        return
    started = time.monotonic()
    num_slots = engine.adapters.weights.num_slots
    steps = list(warm_up_steps(limits.max_num_seqs, limits.max_step_tokens, num_slots, MAX_PROMPT_ROWS))
    run_steps(
        model,
        steps,
        max_model_len=engine.config.max_model_len,
        block=engine.blocks.num_blocks,
        empty_state=engine.config.num_states,
    )
    logger.info("warm-up: %d steps in %.1f s", len(steps), time.monotonic() - started)


def record_steps(engine: Engine, settings: Settings) -> None:
    """Capture the steps as CUDA graphs on a GPU. Raises BadRequest if settings demand graphs and capture fails."""
    device = engine.model.device
    if device.type != "cuda" and settings.cuda_graphs == "on":
        raise BadRequest(f"cuda_graphs is on, but the device is {device.type}")
    if device.type != "cuda":
        return
    warm_up(engine)
    if settings.cuda_graphs == "off":
        return
    started = time.monotonic()
    try:
        limits = engine.config.limits
        engine.runner.record(
            CudaRecorder(device), limits.max_num_seqs, engine.config.max_model_len, limits.max_step_tokens
        )
    except Unrecordable as error:
        if settings.cuda_graphs == "on":
            raise BadRequest(f"cuda_graphs is on, but this model's steps cannot be recorded: {error}") from error
        logger.warning("no CUDA graphs, steps are launched kernel by kernel: %s", error)
    else:
        logger.info("CUDA graphs captured in %.1f s", time.monotonic() - started)


def engine_config(model: BaseModel, settings: Settings, kv_bytes: int) -> EngineConfig:
    """Return the engine's sizes. Raises BadRequest when settings contradict each other.

    kv_bytes: memory for keys, values and states.
    """
    on_cpu = model.device.type == "cpu"
    max_num_seqs, max_step_tokens = _step_sizes(model.device, settings)
    if settings.draft_tokens and model.passes is not None:
        what = "sequences run unbatched, whose caches cannot roll back a token"
        raise BadRequest(f"{_speculates(settings)}, but this model's {what}: leave it out")
    overlaps = _overlaps(model, settings)
    num_states = 0
    passes = model.passes
    if passes is not None:
        max_num_seqs = passes.account.num_places(kv_bytes, max_num_seqs)
        kv_bytes -= max_num_seqs * passes.account.sequence_bytes
    if model.mixers.calls:
        num_states, max_num_seqs = _num_states(model.mixers.slot_bytes, kv_bytes, max_num_seqs)
        kv_bytes -= (num_states + 1) * model.mixers.slot_bytes
    limits = BatchLimits(
        max_num_seqs,
        max_step_tokens,
        settings.prefix_cache and passes is None,
        settings.draft_tokens,
        max_draft_step_tokens=16 if on_cpu else 256,  # about the size from which more tokens lengthen a step
        max_slowdown=settings.max_slowdown,
        max_batch_slowdown=settings.max_batch_slowdown,
        max_later_chunk=1 if passes is not None and passes.continues == "tokens" else 0,
    )
    block_bytes = sum(layer.block_bytes(model.cache_dtype) for layer in model.layers)
    if passes is not None:
        block_bytes = BLOCK_TOKENS * passes.account.token_bytes
    num_blocks = kv_bytes // block_bytes if block_bytes else max_num_seqs * LONGEST_WITHOUT_LIMIT // BLOCK_TOKENS
    room = num_blocks * BLOCK_TOKENS
    longest = model.max_positions or (room if block_bytes else LONGEST_WITHOUT_LIMIT)
    if passes is not None and passes.continues == "nothing":  # every token recomputes the whole text
        longest = min(longest, max_step_tokens)
    if settings.max_model_len > longest:
        raise BadRequest(f"max_model_len is {settings.max_model_len}, the model supports {longest} tokens")
    max_model_len = settings.max_model_len or min(longest, room)
    if room < max(max_model_len, BLOCK_TOKENS):
        raise BadRequest(f"kv_cache_bytes holds {room} tokens: too few for one request of {max_model_len}")
    num_blocks = min(num_blocks, max_num_seqs * -(-max_model_len // BLOCK_TOKENS))
    return EngineConfig(
        limits, num_blocks, max_model_len, num_states, num_blocks * block_bytes, settings.max_mask_s, overlaps
    )


def _speculates(settings: Settings) -> str:
    """Return the setting that asks for draft tokens and its value, as the beginning of a sentence."""
    if settings.draft_model:
        return f"draft_model is {settings.draft_model}"
    return f"max_draft_tokens is {settings.max_draft_tokens}"


def _overlaps(model: BaseModel, settings: Settings) -> bool:
    """Return whether steps overlap. Raises BadRequest if settings demand overlap and it is impossible.

    On a CPU the host itself computes the steps: overlap would gain nothing and delay each token by a step.
    """
    against = ""
    if settings.draft_tokens:
        against = f"{_speculates(settings)}: how many draft tokens are right is known from a step's tokens"
    if model.passes is not None:
        against = "this model's sequences run unbatched"
    if settings.overlap == "on" and against:
        raise BadRequest(f"overlap is on, but {against}: leave it auto")
    return settings.overlap == "on" or (settings.overlap == "auto" and model.device.type != "cpu" and not against)


def _num_states(slot_bytes: int, num_bytes: int, max_num_seqs: int) -> tuple[int, int]:
    """Return the number of state slots, and the number of sequences that may run with them.

    slot_bytes: size of one slot. num_bytes: memory for KV cache and states together; states take at most half. A
    sequence needs one slot, or two with a grammar; the prefix cache gets as many again. Raises BadRequest if no
    sequence fits.
    """
    room = num_bytes // 2 // slot_bytes - 1  # one extra slot holds the empty state
    if room < 2:
        raise BadRequest(f"kv_cache_bytes is {num_bytes}, of which half holds {room} states of {slot_bytes} bytes")
    return min(room, STATES_PER_SEQ * max_num_seqs), min(max_num_seqs, room // 2)


def _step_sizes(device: torch.device, settings: Settings) -> tuple[int, int]:
    """Return the maximum numbers of requests and tokens in a step."""
    on_cpu = device.type == "cpu"
    max_num_seqs = settings.max_num_seqs or (64 if on_cpu else 256)
    return max_num_seqs, max(settings.max_step_tokens or (512 if on_cpu else 2048), max_num_seqs)
