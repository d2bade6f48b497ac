"""Adapters: names and contents (store to all services), registrations (gateway to store), events."""

from __future__ import annotations

from typing import Any, Literal

from protocol.wire.errors import NotFound
from protocol.wire.messages.base import Record, Wire

AdapterState = Literal["unknown", "downloading", "on_disk", "failed"]


class Alias(Record, frozen=True):
    """A name and the digest that it currently refers to, or the reason why there is none."""

    name: str
    state: AdapterState
    digest: str = ""
    source: str = ""  # "local:NAME", "hub:ORG/NAME@COMMIT", "s3://BUCKET/PREFIX"
    reason: str = ""  # why it failed
    tenant: str = ""  # owner of the name; "": shared by all tenants
    created_ms: int = 0
    changed_ms: int = 0
    status: int = 0  # HTTP status that goes with the reason, if it failed
    retry_ms: int = 0  # unix time when a failure may be tried again
    asked_ms: int = 0  # `Registration.asked_ms` for which the source was last checked
    on_request: bool = False  # a request named the source itself
    registered: str = ""  # source of the registration; `source` is the version found there
    base: str = ""  # name of the base for which it was checked; "": the fleet's only one
    confirmed_ms: int = 0  # when the source last accepted a tenant's token for it; 0: it needs no such token

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder under the adapter root, of the same name, which no store has found missing."""
        is_absent = self.state == "failed" and self.status == NotFound.status
        return not self.tenant and self.source == f"local:{self.name}" and not is_absent


class Registration(Record, frozen=True):
    """A name that the stores serve from a remote source until the registration is withdrawn."""

    name: str
    source: str  # `Reference.source`
    token: str = ""  # access token for the source, sealed by `FleetSecret`; "": the store's own
    tenant: str = ""  # owner of the name; "": shared by all tenants
    asked_ms: int = 0  # when it was last requested: a check of the source before that is outdated
    on_request: bool = False  # a request named the source itself
    as_fleet: bool = False  # without a token, the source is read with the fleet's own credentials
    base: str = ""  # name of the base to serve it with; "": the one that the adapter names, or that it fits

    @property
    def is_operators(self) -> bool:
        """Whether an operator registered it. Operators may always use the fleet's own credentials."""
        return not self.tenant and not self.on_request


class Converted(Wire, frozen=True):
    """What an adapter's files say about its approximation by LoRA, see `peft_adapters.kinds.converted`."""

    kind: str  # PEFT's name of the original kind
    keep: float  # share of the Frobenius norm that the conversion had to keep in each layer
    errors: dict[str, float]  # layer -> relative error, for the layers with the largest errors, largest first


class AdapterRecord(Record, frozen=True):
    """The properties of one adapter's content, stored under its digest."""

    digest: str
    rank: int  # largest rank of its sites
    num_bytes: int
    config: dict[str, Any]  # canonical adapter_config
    modules: list[str]  # kinds of sites touched, such as "q_proj"
    source: str
    created_ms: int
    vocab_size: int = 0  # size of its vocabulary in tokens; 0: the base's
    num_labels: int = 0  # labels of its own head, see `ServedModel.label_head`; 0: no head
    num_virtual: int = 0  # number of virtual tokens that it puts before every text
    no_effect: bool = False  # every product that it adds is zero
    mapped: dict[str, str] = {}  # name in its file -> name in the base model, as patterns, where the two differ
    converted: Converted | None = None  # None: its files record no conversion


class AdapterEvent(Wire, frozen=True):
    """An event in an adapter's life. Losing one delays work but never changes a result.

    Gateways send `wanted` for a name. Stores identify adapters by name, workers by digest.
    """

    kind: Literal["wanted", "staged", "resident", "evicted", "failed", "alias", "removed"]
    digest: str = ""
    name: str = ""
    source: str = ""  # wid or sid
    ms: float = 0.0  # duration
    order: str = ""  # `evicted`: id of the order that it answers, see `Control.order`
    pool_bytes: int = 0  # taken or freed in a worker's pool
    host_bytes: int = 0  # taken or freed in its host memory
