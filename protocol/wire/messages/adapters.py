"""Adapters: names and contents (store to everyone), registrations (gateway to store), events."""

from __future__ import annotations

from typing import Any, Literal

from protocol.wire.errors import NotFound
from protocol.wire.messages.base import Record, Wire

AdapterState = Literal["unknown", "downloading", "on_disk", "failed"]


class Alias(Record, frozen=True):
    """A name and what it stands for now."""

    name: str
    state: AdapterState
    digest: str = ""
    source: str = ""  # "local:NAME", "hub:ORG/NAME@COMMIT", "s3://BUCKET/PREFIX"
    reason: str = ""  # why it failed
    tenant: str = ""  # "": everybody's
    created_ms: int = 0
    changed_ms: int = 0
    status: int = 0  # HTTP status of the reason, if it failed
    retry_ms: int = 0  # when a failure may be tried again, unix time
    asked_ms: int = 0  # `Registration.asked_ms` that the last look at its source was for
    on_request: bool = False  # a request named the source itself
    registered: str = ""  # source of the registration; `source` is the version found there
    base: str = ""  # name of the base that it was checked for; "": the fleet's only one
    confirmed_ms: int = 0  # when the source last let a tenant's token read it; 0: it depends on no such token

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder under the adapter root, under its own name; not if no store found such a folder."""
        is_absent = self.state == "failed" and self.status == NotFound.status
        return not self.tenant and self.source == f"local:{self.name}" and not is_absent


class Registration(Record, frozen=True):
    """A name that the stores are to serve from a remote source until it is taken back."""

    name: str
    source: str  # `Reference.source`
    token: str = ""  # access token for the source, sealed by `FleetSecret`; "": the store's own
    tenant: str = ""  # owner of the name; "": shared by all tenants
    asked_ms: int = 0  # when it was last asked for: a look at the source before that is out of date
    on_request: bool = False  # a request named the source itself
    as_fleet: bool = False  # read with the fleet's own credentials where there is no token
    base: str = ""  # name of the base that it is to be served with; "": as the adapter says, or fits

    @property
    def is_operators(self) -> bool:
        """Whether an operator registered it, who may always use the fleet's own credentials."""
        return not self.tenant and not self.on_request


class Converted(Wire, frozen=True):
    """What an adapter says that it approximates by LoRA, see `peft_adapters.kinds.converted`."""

    kind: str  # PEFT's name of the kind that it was
    keep: float  # share of the Frobenius norm that each layer was to keep
    errors: dict[str, float]  # relative error by layer, largest first, of the layers with the largest


class AdapterRecord(Record, frozen=True):
    """The facts of one adapter content."""

    digest: str
    rank: int  # largest of its sites
    num_bytes: int
    config: dict[str, Any]  # canonical adapter_config
    modules: list[str]  # kinds of sites touched, such as "q_proj"
    source: str
    created_ms: int
    vocab_size: int = 0  # tokens it knows, 0: those of the base
    num_labels: int = 0  # labels of its own head, see `ServedModel.label_head`; 0: no head
    num_virtual: int = 0  # virtual tokens that it puts before every text
    no_effect: bool = False  # every product that it adds is zero
    mapped: dict[str, str] = {}  # names of its file -> of the base model, as patterns, where they differ
    converted: Converted | None = None  # None: it says nothing of a conversion


class AdapterEvent(Wire, frozen=True):
    """Something happened to an adapter. Events, not work: losing one costs time, never correctness.

    Gateways say that a name is `wanted`; stores speak of names; workers speak of digests, without a name.
    """

    kind: Literal["wanted", "staged", "resident", "evicted", "failed", "alias", "removed"]
    digest: str = ""
    name: str = ""
    source: str = ""  # wid or sid
    ms: float = 0.0  # duration
    order: str = ""  # id of the order that an `evicted` answers, see `Control.order`
    pool_bytes: int = 0  # taken or freed in a worker's pool
    host_bytes: int = 0  # taken or freed in its host memory
