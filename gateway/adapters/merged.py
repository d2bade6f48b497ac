"""`merged_adapters` of a request, in LoRAX's format: an adapter merged from others for this request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from gateway.bodies.fields import Name
from gateway.bodies.parameter_check import JsonBody
from peft_adapters.recipe import MAX_MERGED, Merge, Strategy, check_merge, digests_of, needs_density
from protocol.wire.errors import BadRequest

MAX_WEIGHT = 1000.0
MAX_SVD_RANK = 4096


class MergedAdapters(JsonBody):
    """A merge of adapters. The last three fields are not in LoRAX."""

    OBJECT = "merged_adapters"

    ids: Annotated[list[Name], Field(min_length=1, max_length=MAX_MERGED, fail_fast=True)]
    weights: Annotated[list[Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)]], Field(fail_fast=True)]
    merge_strategy: Strategy = "linear"
    density: Annotated[float, Field(ge=0, le=1)] | None = None
    majority_sign_method: Literal["total", "frequency"] = "total"
    svd_rank: Annotated[int, Field(ge=0, le=MAX_SVD_RANK)] = 0
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    arithmetic: Literal["peft", "lorax"] = "peft"


def merge_of_request(request: MergedAdapters, digests: Sequence[str]) -> Merge:
    """Return the merge that a request describes. digests: of its ids, in order. Raises BadRequest."""
    prunes = needs_density(request.merge_strategy)
    if prunes and request.density is None:
        text = (
            f"merged_adapters: merge_strategy {request.merge_strategy} needs a density, the share of numbers it keeps"
        )
        raise BadRequest(text, param="merged_adapters")
    merge = Merge(
        adapters=digests_of(digests),
        weights=list(request.weights),
        strategy=request.merge_strategy,
        density=request.density if prunes and request.density is not None else 1.0,
        majority_sign=request.majority_sign_method,
        svd_rank=request.svd_rank,
        seed=request.seed,
        arithmetic=request.arithmetic,
    )
    check_merge(merge)
    return merge
