"""The recipe of a merge, an adapter computed from others on request. Its digest encodes its recipe.

So every worker knows from the digest alone what to merge, whether it prefetches or resumes a request; and equal merges
share memory and prefix cache like equal adapters.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Literal

import msgspec

from protocol.wire.errors import BadRequest
from protocol.wire.messages import Wire

MAX_MERGED = 8
PREFIX = "merge-"

Strategy = Literal[
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip
LORAX_STRATEGIES = ("linear", "ties", "dare_linear", "dare_ties")


class Merge(Wire, frozen=True):
    """How adapters are merged: with PEFT's `add_weighted_adapter`, or LoRAX's arithmetic."""

    adapters: list[bytes]  # digests of the merged adapters
    weights: list[float]  # one per adapter
    strategy: Strategy = "linear"
    density: float = 1.0  # share of the numbers that pruning keeps
    majority_sign: Literal["total", "frequency"] = "total"
    svd_rank: int = 0  # rank of the result; 0: the maximum rank of the adapters
    seed: int = 0  # seed of random pruning
    arithmetic: Literal["peft", "lorax"] = "peft"

    @property
    def digests(self) -> list[str]:
        """The digests of the merged adapters in hex, as used everywhere else."""
        return [digest.hex() for digest in self.adapters]


def check_merge(merge: Merge) -> None:
    """Raise BadRequest for an invalid recipe."""
    if not 1 <= len(merge.adapters) <= MAX_MERGED:
        raise _bad(f"{len(merge.adapters)} adapters; from 1 to {MAX_MERGED} can be merged")
    if len(merge.weights) != len(merge.adapters):
        raise _bad(f"{len(merge.weights)} weights for {len(merge.adapters)} adapters")
    if merge.strategy.startswith("dare") and merge.density == 0.0:
        raise _bad("density is 0, of which nothing is left")
    if merge.arithmetic == "lorax" and merge.strategy not in LORAX_STRATEGIES:
        raise _bad(f"LoRAX has no merge_strategy {merge.strategy}; it has {', '.join(LORAX_STRATEGIES)}")


def digest_of_merge(merge: Merge) -> str:
    """Return the digest under which a merge is loaded, cached and routed."""
    return PREFIX + base64.urlsafe_b64encode(msgspec.msgpack.encode(merge)).decode().rstrip("=")


def is_merge(digest: str) -> bool:
    """Return whether a digest is a recipe, valid or not, rather than an adapter's digest."""
    return digest.startswith(PREFIX)


def merge_of(digest: str) -> Merge | None:
    """Return the merge encoded in a digest, None for an adapter's digest. Raises BadRequest for an invalid recipe."""
    if not is_merge(digest):
        return None
    packed = digest.removeprefix(PREFIX)
    try:
        raw = base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4))
        merge = msgspec.msgpack.decode(raw, type=Merge)
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise BadRequest(f"{digest:.40} is not a merge of adapters: {error}") from error
    check_merge(merge)
    return merge


def needs_density(strategy: str) -> bool:
    """Return whether a strategy prunes, and therefore needs a density."""
    return strategy.startswith(("ties", "dare", "magnitude_prune"))


def digests_of(digests: Sequence[str]) -> list[bytes]:
    """Return hex digests in the form of `Merge.adapters`. Raises BadRequest unless all are of single adapters."""
    try:
        found = [bytes.fromhex(digest) for digest in digests]
    except ValueError:
        found = [b""]
    if not all(found):
        raise _bad("only single adapters can be merged, neither the base model nor merges")
    return found


def _bad(message: str) -> BadRequest:
    return BadRequest(f"merged_adapters: {message}", param="merged_adapters")
