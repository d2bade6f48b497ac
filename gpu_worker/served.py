"""The description of its model that a worker publishes to the fleet."""

from __future__ import annotations

from typing import Any

from gpu_worker.adapters.packing.packer import name_of
from gpu_worker.encoder.model import EncoderModel
from gpu_worker.loading.checkpoint import head_dim_of
from gpu_worker.model.model import BaseModel
from gpu_worker.tasks.labels import activation_of, pair_activation_of
from protocol.queue.bus import now_ms
from protocol.runtime.model_files import served_name
from protocol.runtime.settings import Settings
from protocol.wire import messages as m


def served_model(model: BaseModel | EncoderModel, max_model_len: int, settings: Settings) -> m.ServedModel:
    """Return the model's description for the fleet."""
    own = _encoder_tasks(model) if isinstance(model, EncoderModel) else _decoder_tasks(model)
    return m.ServedModel(
        model=settings.model,
        name=served_name(settings.model, settings.served_name),
        fingerprint=model.fingerprint,
        model_type=model.config.model_type,
        vocab_size=model.vocab_size,
        max_model_len=max_model_len,
        sites=_in_order(model),
        idle=model.idle if isinstance(model, BaseModel) else [],
        dtype=name_of(model.dtype),
        tied_embeddings=bool(getattr(model.config, "tie_word_embeddings", False)),
        created_ms=now_ms(),
        device=model.device.type,
        **own,
        head_dim=head_dim_of(model.config),
    )


def _in_order(model: BaseModel | EncoderModel) -> list[m.SiteShape]:
    """Return the model's sites in module order; those of bare parameters come last."""
    places = {name: place for place, (name, _) in enumerate(model.module.named_modules())}
    return sorted(model.adaptable.shapes(model.sites), key=lambda site: places.get(site.name, len(places)))


def _encoder_tasks(model: EncoderModel) -> dict[str, Any]:
    found = {"task": model.task, "labels": model.labels, "width": model.width, "unit_length": model.pooling.unit_length}
    if model.task == "score":
        found |= {"label_head": model.label_head, "missing": model.missing, **_activations(model)}
    return found


def _activations(model: BaseModel | EncoderModel) -> dict[str, Any]:
    return {"activation": activation_of(model.config), "pair_activation": pair_activation_of(model.config)}


def _decoder_tasks(model: BaseModel) -> dict[str, Any]:
    tasks, pooling = model.tasks, model.tasks.pooling
    return {
        "task": tasks.main,
        "tasks": sorted(tasks.names - {tasks.main}),
        "labels": tasks.labels,
        "label_head": tasks.head_name if "score" in tasks.names else "",
        "width": model.width if pooling is not None else 0,
        "prefix": model.prefix,
        "unit_length": pooling is not None and pooling.unit_length,
        **(_activations(model) if tasks.head is not None else {}),
    }
