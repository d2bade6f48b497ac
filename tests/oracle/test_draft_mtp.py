"""A base's own multi-token prediction head (MTP) drafts by its definition and changes no output."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle.eagle_definition import Tensors
from oracle.peft_oracle import Lora, Oracle, ask, greedy_request, packed_engine, prompts, warm
from oracle.test_draft_model import NUM_TOKENS, SPECULATING, Always, watch_drafts
from oracle.tiny_models import tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpu_worker.build import load_engine
from gpu_worker.drafting.draft_head import DraftHead
from gpu_worker.drafting.load import LoadedHead, load_draft_model
from gpu_worker.engine.engine import Engine
from gpu_worker.model.prepare import prepare_model
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest

LORAS = {"x1": Lora(4, ("q_proj", "v_proj", "in_proj_qkv", "out_proj")), "x2": Lora(2, ("o_proj", "down_proj"))}


def head_tensors(config: Any) -> Tensors:
    """Return a random head's tensors by their published names."""
    generator = torch.Generator().manual_seed(3)
    width, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads * dim, config.num_key_value_heads * dim
    linears = {
        "fc": (width, 2 * width),
        "layers.0.self_attn.q_proj": (2 * heads, width),
        "layers.0.self_attn.k_proj": (kv_heads, width),
        "layers.0.self_attn.v_proj": (kv_heads, width),
        "layers.0.self_attn.o_proj": (width, heads),
        "layers.0.mlp.gate_proj": (inner, width),
        "layers.0.mlp.up_proj": (inner, width),
        "layers.0.mlp.down_proj": (width, inner),
    }
    norms = {
        "pre_fc_norm_embedding": width,
        "pre_fc_norm_hidden": width,
        "norm": width,
        "layers.0.input_layernorm": width,
        "layers.0.post_attention_layernorm": width,
        "layers.0.self_attn.q_norm": dim,
        "layers.0.self_attn.k_norm": dim,
    }
    made = {name: torch.randn(size, generator=generator) * size[1] ** -0.5 for name, size in linears.items()}
    made |= {name: 0.2 * torch.randn(size, generator=generator) for name, size in norms.items()}
    return {f"mtp.{name}.weight": tensor for name, tensor in made.items()}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Oracle, Tensors, str]:
    """Return a hybrid base with adapters, its own head's tensors, and the folder that holds both."""
    base: Any = tiny_model("qwen3_5_text")
    folder = tmp_path_factory.mktemp("hybrid")
    base.save_pretrained(folder)
    made = head_tensors(base.config)
    file = folder / "model.safetensors"
    save_file(load_file(file) | made, file, {"format": "pt"})
    return Oracle(base, LORAS, scale=0.4), made, str(folder)


def engine_of(oracle: Oracle, folder: str, **settings: Any) -> Engine:
    """Return an engine on a copy of the base, whose own head drafts whenever possible."""
    model = prepare_model(copy.deepcopy(oracle.untouched), frozenset(), None)
    loaded = load_draft_model(folder, None, model, None, Path(folder))
    assert isinstance(loaded, LoadedHead)
    values = {"model": "oracle", "adapter_pool_bytes": 64 << 20, "kv_cache_bytes": 64 << 20} | SPECULATING | settings
    return packed_engine(model, Settings(**values), oracle.fetch, None, LoadedHead(loaded.head, Always()))


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1 + weight)


def by_definition(own: Tensors, oracle: Oracle, name: str, text: np.ndarray, num: int) -> list[int]:
    """Return `num` draft tokens after a text under an adapter.

    As in vllm/model_executor/models/qwen3_5_mtp.py: the normalized embedding and last hidden states of the base,
    concatenated, pass through `fc`, a Qwen3.5 layer with full attention, a norm, and the base's head. After the text,
    that norm's output replaces the base's hidden states.
    """
    config: Any = oracle.untouched.config
    eps, dim, heads, kv_heads = (
        config.rms_norm_eps,
        config.head_dim,
        config.num_attention_heads,
        config.num_key_value_heads,
    )

    def part(name: str) -> Tensor:
        return own[f"mtp.{name}.weight"]

    def layer(tokens: list[int], hidden: Tensor) -> Tensor:
        embeds = oracle.untouched.get_input_embeddings()(torch.tensor(tokens))
        x = torch.cat(
            (norm(embeds, part("pre_fc_norm_embedding"), eps), norm(hidden, part("pre_fc_norm_hidden"), eps)), -1
        )
        rows = F.linear(x, part("fc"))
        x = norm(rows, part("layers.0.input_layernorm"), eps)
        q, gate = F.linear(x, part("layers.0.self_attn.q_proj")).view(len(x), heads, 2, dim).unbind(2)
        k, v = (F.linear(x, part(f"layers.0.self_attn.{n}_proj")).view(len(x), kv_heads, dim) for n in "kv")
        q, k = norm(q, part("layers.0.self_attn.q_norm"), eps), norm(k, part("layers.0.self_attn.k_norm"), eps)
        rope = config.rope_parameters
        num_turned = int(dim * rope.get("partial_rotary_factor", 1.0))
        angles = torch.arange(len(x))[:, None] * rope["rope_theta"] ** (-torch.arange(0, num_turned, 2) / num_turned)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]

        def turned(x: Tensor) -> Tensor:
            first, second, rest = x.split((num_turned // 2, num_turned // 2, dim - num_turned), -1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)

        k, v = turned(k).repeat_interleave(heads // kv_heads, 1), v.repeat_interleave(heads // kv_heads, 1)
        scores = torch.einsum("ihd,jhd->hij", turned(q), k) * dim**-0.5
        scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
        attended = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v) * gate.sigmoid()
        rows = rows + F.linear(attended.reshape(len(x), -1), part("layers.0.self_attn.o_proj"))
        x = norm(rows, part("layers.0.post_attention_layernorm"), eps)
        inner = F.silu(F.linear(x, part("layers.0.mlp.gate_proj"))) * F.linear(x, part("layers.0.mlp.up_proj"))
        return norm(rows + F.linear(inner, part("layers.0.mlp.down_proj")), part("norm"), eps)[-1]

    with torch.inference_mode(), oracle._under(name) as model:
        ids = torch.from_numpy(text.astype(np.int64))[None]
        hidden = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-1][0, :-1]
        tokens, found = ids[0, 1:].tolist(), list[int]()
        for _ in range(num):
            out = layer(tokens, hidden)
            head: Any = oracle.untouched.get_output_embeddings()
            found.append(int(F.linear(out, head.weight).argmax()))
            tokens.append(found[-1])
            hidden = torch.cat((hidden, out[None]))
    return found


@pytest.mark.parametrize("settings", [{}, {"max_step_tokens": 12}], ids=["plain", "chunked"])
def test_drafts_are_those_of_its_definition_and_answers_pefts(
    hybrid: tuple[Oracle, Tensors, str], settings: dict[str, Any]
) -> None:
    oracle, made, folder = hybrid
    engine = engine_of(oracle, folder, **settings)
    warm(engine, oracle.names)
    found, texts = watch_drafts(engine), prompts(3, 190, (3, 24, 45))
    names = ("", "x1", "x2")
    asked = ask(engine, [greedy_request(str(i), names[i], text, NUM_TOKENS) for i, text in enumerate(texts)])
    for i, text in enumerate(texts):
        assert asked.ids[str(i)] == oracle.greedy(names[i], text, NUM_TOKENS)
    assert len(found) > 12
    for text, draft in found[::2]:
        name = next(names[i] for i, own in enumerate(texts) if text.tobytes().startswith(own.tobytes()))
        assert draft == by_definition(made, oracle, name, text, len(draft))
    assert len({draft[0] for _, draft in found}) > 4
    counters = engine.counters
    assert counters.num_model_accepted_tokens < counters.num_model_drafted_tokens
    source = engine.batcher.draft_model
    assert isinstance(source, DraftHead)
    assert source.blocks.num_free == source.blocks.num_blocks


def test_a_base_named_as_its_own_draft_model_drafts_by_its_head(
    hybrid: tuple[Oracle, Tensors, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFLEET_CACHE_DIR", str(tmp_path / "cache"))
    oracle, _, folder = hybrid
    settings = Settings(
        model=folder,
        draft_model=folder,
        dtype="float32",
        device="cpu",
        kv_cache_bytes=4 << 20,
        adapter_pool_bytes=1 << 20,
        threads=1,
    )
    thread, _ = load_engine(settings, lambda _: pytest.fail("no adapter is asked for"))
    engine = thread.engine
    assert isinstance(engine, Engine)
    source = engine.batcher.draft_model
    assert isinstance(source, DraftHead)
    assert 0 < source.blocks.num_blocks * source.head.block_bytes <= settings.kv_cache_bytes // 8
    assert source._payoff.repeats
    [text] = prompts(1, 190, (24,))
    assert ask(engine, [greedy_request("r", "", text, 30)]).ids["r"] == oracle.greedy("", text, 30)
    thread.engine.close()


def test_heads_of_other_shapes_and_types_are_refused_by_name(
    hybrid: tuple[Oracle, Tensors, str], tmp_path: Path
) -> None:
    oracle, made, folder = hybrid
    base = prepare_model(copy.deepcopy(oracle.untouched), frozenset(), None)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(folder) / name).read_bytes())
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({name: own for name, own in tensors.items() if name != "mtp.norm.weight"}, file, {"format": "pt"})
    with pytest.raises(BadRequest, match=r"own head lacks, or has in another shape or besides: norm\.weight"):
        load_draft_model(str(tmp_path), None, base, None, tmp_path)
    save_file(tensors | {"mtp.layers.1.mlp.up_proj.weight": made["mtp.fc.weight"]}, file, {"format": "pt"})
    with pytest.raises(BadRequest, match=r"or besides: layers\.1\.mlp\.up_proj\.weight"):
        load_draft_model(str(tmp_path), None, base, None, tmp_path)
    base.config.model_type = "other"
    with pytest.raises(BadRequest, match="own head is of the type other; served are qwen3_5_text"):
        load_draft_model(str(tmp_path), None, base, None, tmp_path)
