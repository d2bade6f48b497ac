"""Tiny quantized checkpoints in the formats of the quantization libraries, and adapters on them compared with PEFT."""

from __future__ import annotations

import importlib
import importlib.util
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracle.adapters.peft_kinds import (
    MAX_DIFFERENCE,
    NUM_TOKENS,
    Base,
    Kind,
    asked_prompts,
    engine_logits,
    make_adapter,
    make_base,
    model_logits,
    read_files,
)
from oracle.adapters.virtual_cases import task_of
from oracle.peft_oracle import greedy_request, oracle_settings
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from gpu_worker.build import build_engine
from gpu_worker.engine.engine import Engine
from gpu_worker.loading.checkpoint import quantisation_of, read_model
from gpu_worker.model.logits_check import MAX_OVER_SENSITIVITY, last_digits_changed
from gpu_worker.model.prepare import prepare_model
from protocol.wire.errors import BadRequest

BASE: Base = ("llama", {"intermediate_size": 128})  # on a CPU bitsandbytes needs 4-bit blocks of 64
CPU = torch.device("cpu")
GROUP = 32  # weights that share a scale in the 4-bit formats
BITS = 4
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""For each group of four bits in an AWQ word: which of eight neighbors it holds."""

ADAPTERS = {
    "few": Kind(BASE, {"target_modules": ["q_proj", "down_proj"]}),
    "all": Kind(
        BASE,
        {
            "r": 7,
            "use_rslora": True,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
            "trainable_token_indices": [3, 17],
        },
    ),
}


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to quantize a base."""

    packages: tuple[str, ...]  # that transformers needs to load it
    write: Callable[[Path], object]  # writes a model folder
    dtype: torch.dtype = torch.float32  # of activations
    rounds: bool = False  # whether activations are also rounded to fewer bits than fp32 has
    note: str = ""

    def allowed(self, sensitivity: float) -> float:
        """Return the allowed difference of a logit from PEFT's.

        Where activations are rounded, another order of sums moves some to the next code. sensitivity: difference of
        PEFT's logits when the last digits of its embeddings change.
        """
        return MAX_OVER_SENSITIVITY * sensitivity if self.rounds else MAX_DIFFERENCE

    @property
    def missing(self) -> str:
        """Return the packages that are not installed, separated by commas."""
        return ", ".join(name for name in self.packages if importlib.util.find_spec(name) is None)


# ---------------------------------------------------------------- writing checkpoints


def by_transformers(make_config: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    """Return a writer that lets transformers quantize while loading, and save the result."""

    def write(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as plain:
            make_base(BASE).save_pretrained(plain)
            model = AutoModelForCausalLM.from_pretrained(
                plain, quantization_config=make_config(), device_map={"": CPU}, dtype=dtype
            )
        model.save_pretrained(folder)

    return write


def by_hand(config: dict[str, Any], pack: Callable[[Tensor], dict[str, Tensor]]) -> Callable[[Path], None]:
    """Return a writer that replaces the weight of every linear layer except the head by `pack(weight)`."""

    def write(folder: Path) -> None:
        model = make_base(BASE)
        model.config.save_pretrained(folder)
        tensors = dict(model.state_dict())
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                packed = pack(tensors.pop(f"{name}.weight"))
                tensors |= {f"{name}.{part}": tensor for part, tensor in packed.items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", PT)
        edit_config(folder, quantization_config=config)

    return write


PT = {"format": "pt"}


def edit_config(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def affine(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize [N, K] to 4 bits: codes [N, K], scales and zero points [N, K / GROUP], w = (code - zero) * scale."""
    groups = weight.reshape(len(weight), -1, GROUP)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / (2**BITS - 1)).half().float()
    zero = (-low / scale).round().clamp(1, 2**BITS - 1)  # GPTQ's files store zero - 1
    codes = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 2**BITS - 1)
    return codes.reshape(weight.shape).int(), scale, zero.int()


def pack_words(codes: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Pack each eight neighbors of [n, 8 m] into a word: int32 [n, m]."""
    parts = codes.reshape(len(codes), -1, 8)[..., list(order)].to(torch.int64)
    words = (parts << (BITS * torch.arange(8))).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def pack_gptq(weight: Tensor) -> dict[str, Tensor]:
    codes, scale, zero = affine(weight)
    return {
        "qweight": pack_words(codes).T,
        "qzeros": pack_words(zero.T - 1),
        "scales": scale.T.half(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }


def pack_awq(weight: Tensor) -> dict[str, Tensor]:
    codes, scale, zero = affine(weight)
    return {
        "qweight": pack_words(codes.T, AWQ_ORDER),
        "qzeros": pack_words(zero.T, AWQ_ORDER),
        "scales": scale.T.half(),
    }


def pack_fp8_blocks(weight: Tensor) -> dict[str, Tensor]:
    """Quantize as DeepSeek does: to FP8, with one scale per 32 by 32 weights."""
    n, k = weight.shape
    blocks = weight.reshape(n // GROUP, GROUP, k // GROUP, GROUP)
    scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    codes = (blocks / scale[:, None, :, None]).reshape(n, k).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}


def pack_fp8_rows(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def pack_int8_rows(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def pack_int4_groups(weight: Tensor) -> dict[str, Tensor]:
    groups = weight.reshape(len(weight), -1, GROUP)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    codes = (groups / scale).round().int().reshape(weight.shape) + 8
    shape = torch.tensor(weight.shape)
    return {"weight_packed": pack_words(codes), "weight_scale": scale[..., 0], "weight_shape": shape}


def compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a compressed-tensors config for symmetric weights."""
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group},
    }  # fmt: skip


GROUPS_OF_4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
ROWS_OF_8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
ROWS_OF_FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
EACH_TOKEN = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}

GPTQ = {"quant_method": "gptq", "bits": BITS, "group_size": GROUP, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": BITS, "group_size": GROUP, "zero_point": True, "version": "gemm"}
FP8_BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [GROUP, GROUP]}


def torchao(module: str) -> Any:
    """Return a module of torchao, which few environments have installed."""
    return importlib.import_module(f"torchao.{module}")


def torchao_config(name: str, **fields: Any) -> Callable[[], TorchAoConfig]:
    def make() -> TorchAoConfig:
        return TorchAoConfig(getattr(torchao("quantization"), name)(**fields))

    return make


def torchao_int4() -> TorchAoConfig:
    quantization = torchao("quantization")
    dtype = getattr(torch, f"int{BITS}")
    return TorchAoConfig(
        quantization.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=quantization.PerGroup(GROUP))
    )


BNB, AO, CT, GM = ("bitsandbytes",), ("torchao",), ("compressed_tensors",), ("gptqmodel", "optimum")


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def nf4_double() -> BitsAndBytesConfig:
    options = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)


SCHEMES: dict[str, Scheme] = {
    "bitsandbytes int8": Scheme(
        BNB, by_transformers(lambda: BitsAndBytesConfig(load_in_8bit=True)), rounds=True,
        note="activations in int8, outliers apart: which columns are, all tokens of a step decide",
    ),
    "bitsandbytes nf4": Scheme(BNB, by_transformers(nf4), rounds=True, note="in bf16 where the CPU has it"),
    "bitsandbytes nf4, double": Scheme(BNB, by_transformers(nf4_double, torch.bfloat16), torch.bfloat16, rounds=True),
    "torchao int8": Scheme(AO, by_transformers(torchao_config("Int8WeightOnlyConfig"))),
    "torchao int8, dynamic": Scheme(
        AO, by_transformers(torchao_config("Int8DynamicActivationInt8WeightConfig")), rounds=True,
        note="activations in int8, a scale for each token",
    ),
    "torchao int4 (intx)": Scheme(AO, by_transformers(torchao_int4)),
    "torchao float8": Scheme(AO, by_transformers(torchao_config("Float8WeightOnlyConfig"))),
    "GPTQ int4": Scheme(GM, by_hand(GPTQ, pack_gptq)),
    "GPTQ int4, bf16": Scheme(GM, by_hand(GPTQ, pack_gptq), torch.bfloat16, rounds=True, note="the AVX-512 kernel"),
    "AWQ int4": Scheme(GM, by_hand(AWQ, pack_awq)),
    "AWQ int4, bf16": Scheme(GM, by_hand(AWQ, pack_awq), torch.bfloat16, rounds=True, note="the AVX-512 kernel"),
    "compressed-tensors W4A16": Scheme(
        CT, by_hand(compressed("pack-quantized", GROUPS_OF_4), pack_int4_groups), note="made dense in the first pass"
    ),
    "compressed-tensors W8A8": Scheme(
        CT, by_hand(compressed("int-quantized", ROWS_OF_8, EACH_TOKEN | {"type": "int"}), pack_int8_rows), rounds=True,
        note="made dense in the first pass; activations in int8, a scale for each token",
    ),
    "compressed-tensors FP8": Scheme(
        CT, by_hand(compressed("float-quantized", ROWS_OF_FP8, EACH_TOKEN | {"type": "float"}), pack_fp8_rows),
        rounds=True, note="made dense in the first pass; activations in fp8, a scale for each token",
    ),
    "FP8 (DeepSeek's blocks)": Scheme(
        (), by_hand(FP8_BLOCKS, pack_fp8_blocks), note="made dense when loaded: its FP8 kernels need a GPU"
    ),
}  # fmt: skip


def write_torchao_int4(folder: Path) -> None:
    """Write the default int4 layout as torchao saves it; torchao itself can create it only with its GPU kernels."""
    quantization = torchao("quantization")
    model = make_base(BASE).bfloat16()
    model.config.save_pretrained(folder)
    tensors = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = tensors[f"{name}.weight"]
            codes, scale, zero = affine(weight.float())
            signed = codes - 8
            words = ((signed[:, 1::2] << BITS) | (signed[:, ::2] & 15)).to(torch.int8)
            offset = (8 - zero) * scale
            parts = (words, scale.T.bfloat16().contiguous(), offset.T.bfloat16().contiguous())
            tensors[f"{name}.weight"] = quantization.Int4Tensor(*parts, [1, GROUP], weight.shape)
    support = torchao("prototype.safetensors.safetensors_support")
    flat, metadata = support.flatten_tensor_state_dict(tensors)
    save_file(flat, folder / "model.safetensors", {**metadata, **PT})
    config = TorchAoConfig(quantization.Int4WeightOnlyConfig(group_size=GROUP))
    edit_config(folder, quantization_config=config.to_dict())


GPU_ONLY: dict[str, Scheme] = {
    "torchao int4": Scheme(AO, write_torchao_int4, torch.bfloat16, note="kernels of mslk; PEFT 0.21 itself refuses it"),
}
"""Schemes that can be loaded but not run on a CPU; they are refused at start."""


# ---------------------------------------------------------------- measuring


def load_base(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a folder with transformers as its users do."""
    options: dict[str, Any] = {"device_map": {"": CPU}, "dtype": dtype, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    if quantisation_of(model.config) == "compressed-tensors":  # PEFT adapts no packed weights: a pass unpacks them
        model_logits(model, np.arange(4), [0])
    return model


def engine_on(folder: Path, dtype: torch.dtype, adapters: dict[str, Path]) -> Engine:
    """Return an engine on a quantized folder, loaded as in a worker."""
    model = prepare_model(read_model(folder, CPU, dtype), frozenset(), None)
    settings = oracle_settings(max_step_tokens=16, max_num_seqs=8)
    return build_engine(model, settings, lambda name: read_files(adapters[name]), None)[0]


@dataclass(frozen=True, slots=True)
class Measured:
    """How adapters on a quantized base compare: maximum logit differences over all rows."""

    difference: float  # from PEFT's on the same base, including the base's own
    sensitivity: float  # of PEFT's logits when the last digits of its embeddings change
    change: float  # caused by an adapter; the smallest over the adapters
    rounding: float  # of the base, caused by quantization


def measure(scheme: Scheme, folder: Path, kinds: Mapping[str, Kind] = ADAPTERS) -> Measured:
    """Run the quantized base and adapters in one batch with chunked prefill; compare each row with PEFT alone."""
    adapters = {name: folder / name for name in kinds}
    for name, kind in kinds.items():
        make_adapter(kind, adapters[name], scale=0.1)
    base = folder / "base"
    base.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the quantization libraries
        scheme.write(base)
        engine = engine_on(base, scheme.dtype, adapters)
        prompts = asked_prompts(Kind(BASE))
        names = ("", *kinds)
        requests = [
            greedy_request(f"{n}/{i}", n, prompt, NUM_TOKENS) for i, prompt in enumerate(prompts) for n in names
        ]
        got = engine_logits(engine, requests)
        engine.check_integrity()

        def logits_of(model: Any, name: str) -> Tensor:
            """Return a model's logits for the texts of one adapter's rows: [n, V]."""
            mine = [(r.prompt, got[r.rid][0]) for r in requests if r.digest == name]
            more = task_of(kinds[name]) if name else {}
            return torch.cat([model_logits(model, text, ids, **more)[-len(ids) :].float() for text, ids in mine])

        differences, sensitivities, changes = [], [], []
        plain = load_base(base, scheme.dtype)
        for name in names:
            model: Any = load_base(base, scheme.dtype)
            if name:
                model = PeftModel.from_pretrained(model, str(adapters[name])).eval()
            expected = logits_of(model, name)
            with last_digits_changed(model):
                sensitivities.append(apart(logits_of(model, name), expected))
            differences.append(
                apart(torch.cat([got[r.rid][1].float() for r in requests if r.digest == name]), expected)
            )
            changes.append(apart(logits_of(plain if name else make_base(BASE), name), expected))
    return Measured(max(differences), max(sensitivities), min(changes[1:]), changes[0])


def apart(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def refusal(scheme: Scheme, folder: Path) -> str:
    """Return why a base is refused that can be loaded but cannot run here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheme.write(folder)
        model = read_model(folder, CPU, scheme.dtype)
        try:
            prepare_model(model, frozenset(), None)
        except BadRequest as error:
            return error.message.partition(" cannot be served: ")[2]
    raise AssertionError("it can run")
