"""Every Redis key, built in one place. Each key's docstring has its TTL; `is_permanent` lists the keys without one."""

from __future__ import annotations

from dataclasses import dataclass

INTERACTIVE = "interactive"
BATCH = "batch"
CLASSES = (INTERACTIVE, BATCH)


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys of one fleet. All keys of a request share the hash tag `{shard}`, so that one script can access them."""

    namespace: str = "lf"
    shard: str = "0"

    @property
    def tag(self) -> str:
        """Prefix of every sharded key, from which scripts build the keys of requests."""
        return f"{self.namespace}:{{{self.shard}}}"

    # Keys of one request. All expire: at deadline + 1 h; 2 min after the end (stored: 24 h, dead-lettered: 7 days).
    def req(self, rid: str) -> str:
        """Hash: state, epoch, owner and the other facts of a request. Written by scripts only."""
        return f"{self.tag}:req:{rid}"

    def call(self, rid: str) -> str:
        """Hash: number of a call's requests that have not ended, and what the call costs its tenant.

        rid: the call's first request. Lives until the call's last request has ended. What a stored call costs its
        tenant lives on with its logs.
        """
        return f"{self.tag}:call:{rid}"

    def body(self, rid: str) -> str:
        """Hash: the `messages.Body` of a call; see `protocol.queue.calls`.

        rid: the call's first request. Lives until the call's last request has ended.
        """
        return f"{self.tag}:body:{rid}"

    def tok(self, rid: str) -> str:
        """String: output token ids, int32 little endian, appended by scripts."""
        return f"{self.tag}:tok:{rid}"

    def lp(self, rid: str) -> str:
        """String: logprob records, `messages.logprob_record_bytes` each, parallel to `tok`."""
        return f"{self.tag}:lp:{rid}"

    def plp(self, rid: str) -> str:
        """String: prompt tokens (int32), then their logprob records, the first NaN. Written with the first output."""
        return f"{self.tag}:plp:{rid}"

    # Work. Each stream has one reader, which remembers the last id that it read. An entry is deleted when its work is
    # done, and the stream is never trimmed, so it lists the work not yet done. Its length is bounded at admission.
    def sub(self, cls: str) -> str:
        """Stream: submitted requests of a class until they are assigned, gateway -> scheduler. Permanent."""
        return f"{self.tag}:sub:{cls}"

    def work(self, wid: str) -> str:
        """Stream: batches for one worker; an entry stays until its batch has ended. 1 h, renewed by heartbeats."""
        return f"{self.tag}:w:{wid}:in"

    def own(self, wid: str) -> str:
        """Hash rid -> epoch: the requests that a worker owns. 1 h after the last assignment; only scripts write it."""
        return f"{self.tag}:w:{wid}:own"

    # Control and events. Bounded streams.
    def ctl(self, wid: str) -> str:
        """Stream: `messages.Control` for one worker. Trimmed to 5 min; 1 h, renewed by the worker's heartbeat."""
        return f"{self.tag}:w:{wid}:ctl"

    def out(self, gid: str) -> str:
        """Stream: packed `messages.Delta` lists for one gateway. Trimmed to 60 s; 5 min, renewed by the gateway."""
        return f"{self.tag}:out:{gid}"

    @property
    def ended(self) -> str:
        """Stream: `messages.Ended`, at most one entry per step, workers -> scheduler. MAXLEN, permanent."""
        return f"{self.tag}:ended"

    @property
    def dlq(self) -> str:
        """Stream: dead letters. 7 days."""
        return f"{self.tag}:dlq"

    # Jobs: 24 h.
    def job(self, jid: str) -> str:
        """Hash: `b`, a `messages.Job`; `request`, JSON of the HTTP body's fields that its answer needs."""
        return f"{self.tag}:job:{jid}"

    def jobs(self, tenant: str) -> str:
        """Sorted set: a tenant's job ids by creation time."""
        return f"{self.tag}:jobs:{tenant}"

    def idem(self, tenant: str, key: str) -> str:
        """String NX, 24 h: `messages.Idempotent`, the call for which an Idempotency-Key was first used."""
        return f"{self.tag}:idem:{tenant}:{key}"

    # Conversations. The first four keys expire after the time of the settings, counted from the last change.
    def conversation(self, conversation_id: str) -> str:
        """Hash: `b`, a `messages.Conversation`; `tenant`; `bytes`, its whole size; `next`, the next item's number."""
        return f"{self.tag}:conv:{conversation_id}"

    def conversation_items(self, conversation_id: str) -> str:
        """Hash: item id -> the item as JSON."""
        return f"{self.tag}:conv:{conversation_id}:items"

    def conversation_order(self, conversation_id: str) -> str:
        """Sorted set: item id -> its number."""
        return f"{self.tag}:conv:{conversation_id}:order"

    def conversation_turns(self, conversation_id: str) -> str:
        """Sorted set: id of a response to be added to the conversation -> unix ms when the response was submitted."""
        return f"{self.tag}:conv:{conversation_id}:turns"

    def conversations(self, tenant: str) -> str:
        """Sorted set: conversation id -> unix ms when it expires. Lives until the last of them expires."""
        return f"{self.tag}:convs:{tenant}"

    @property
    def turns(self) -> str:
        """Sorted set: `<tenant>:<conversation>:<response>` of every response to be added -> unix ms of the next check.

        Permanent, cleaned by gateways.
        """
        return f"{self.tag}:turns"

    # Files and batches.
    def file(self, file_id: str) -> str:
        """String: `messages.File`. Lives until the file expires."""
        return f"{self.tag}:file:{file_id}"

    def files(self, tenant: str) -> str:
        """Sorted set: file id -> unix ms of creation. Lives until the last of them expires."""
        return f"{self.tag}:files:{tenant}"

    def file_sizes(self, tenant: str) -> str:
        """Hash: file id -> bytes, and `sum` of all. Lives until the last of them expires."""
        return f"{self.tag}:files:{tenant}:sizes"

    @property
    def file_expiry(self) -> str:
        """Sorted set: `<tenant>:<file id>` -> unix ms when it expires. Permanent, cleaned by gateways."""
        return f"{self.tag}:file-expiry"

    def batch(self, batch_id: str) -> str:
        """Hash: `b`, a `messages.Batch`; `owner`, the gateway that runs it; `epoch`, owners so far; `cancel`, unix ms.

        Lives as long as files may live by the settings.
        """
        return f"{self.tag}:batch:{batch_id}"

    def batches(self, tenant: str) -> str:
        """Sorted set: batch id -> unix ms of creation. Lives until the last of them expires."""
        return f"{self.tag}:batches:{tenant}"

    def open_batches_of(self, tenant: str) -> str:
        """Set: ids of a tenant's batches that have not ended. Lives until the last of them expires."""
        return f"{self.tag}:batches:{tenant}:open"

    @property
    def open_batches(self) -> str:
        """Sorted set: `<tenant>:<batch id>` -> unix ms until which a gateway runs it, 0 before any does. Permanent."""
        return f"{self.tag}:open-batches"

    # Webhooks: pending events are stored per tenant, and tenants are served in turn.
    def hooks(self, tenant: str) -> str:
        """Hash: endpoint id -> `messages.WebhookEndpoint` of a tenant. Permanent."""
        return f"{self.tag}:hooks:{tenant}"

    @property
    def ends(self) -> str:
        """Sorted set: tenant -> unix ms since which its oldest end waits, or of its last turn. Permanent."""
        return f"{self.tag}:ends"

    def ends_of(self, tenant: str) -> str:
        """Stream: ends of a tenant's jobs and batches without deliveries yet: `id`, `type`. Permanent."""
        return f"{self.tag}:ends:{tenant}"

    @property
    def outboxes(self) -> str:
        """Sorted set: tenant -> unix ms when its next delivery is due, or of its last turn. Permanent."""
        return f"{self.tag}:outboxes"

    def outbox(self, tenant: str) -> str:
        """Hash: delivery id -> `messages.Delivery`, until it is delivered or given up. Permanent."""
        return f"{self.tag}:outbox:{tenant}"

    def outbox_times(self, tenant: str) -> str:
        """Sorted set: delivery id -> unix ms of its next attempt. Permanent."""
        return f"{self.tag}:outbox-due:{tenant}"

    # Keys of the previous version, shared by all tenants; `take_over.lua` empties them.
    @property
    def old_hooks(self) -> str:
        """Hash: `<tenant>:<endpoint id>` -> `messages.WebhookEndpoint`. Permanent."""
        return f"{self.tag}:webhooks"

    @property
    def old_ends(self) -> str:
        """Stream: ends of jobs and batches: `tenant`, `id` and, of a batch, `type`. MAXLEN, permanent."""
        return f"{self.tag}:events"

    @property
    def old_cursor(self) -> str:
        """String: the last entry of `old_ends` for which deliveries were made. Permanent."""
        return f"{self.tag}:events:cursor"

    @property
    def old_deliveries(self) -> str:
        """Hash: delivery id -> `messages.Delivery`. Permanent."""
        return f"{self.tag}:deliveries"

    @property
    def old_delivery_times(self) -> str:
        """Sorted set: delivery id -> unix ms of its next attempt. Permanent."""
        return f"{self.tag}:deliveries:due"

    def undelivered(self, tenant: str) -> str:
        """Hash: delivery id -> `messages.Delivery` that was given up. 7 days after the last one."""
        return f"{self.tag}:undelivered:{tenant}"

    @property
    def sender(self) -> str:
        """String PX 10 s: the gateway that sends webhooks."""
        return f"{self.tag}:webhook-sender"

    # A tenant's quotas. Written by the scripts that accept and end requests.
    def quota(self, tenant: str) -> str:
        """Hash: used requests and tokens of the minute, and when they were used. Lives until all is available again."""
        return f"{self.tag}:q:{tenant}"

    def running(self, tenant: str) -> str:
        """Sorted set: rid -> unix ms after which the request no longer counts. Lives until the last deadline."""
        return f"{self.tag}:q:{tenant}:run"

    def kept(self, tenant: str) -> str:
        """Sorted set: the tenant's data in the queue, `<call>:<bytes>` -> unix ms of expiry; and the member `sum`.

        The score of `sum` is minus the bytes of all others. Lives until the last of them has expired.
        """
        return f"{self.tag}:q:{tenant}:kept"

    # Usage, for accounting. A day is the number of days since 1970-01-01 UTC; the settings say how many days are kept.
    def usage_tenants(self, day: int | str) -> str:
        """Set: the tenants that have a `usage` hash for a day."""
        return f"{self.tag}:usage:{day}"

    def usage(self, day: int | str, tenant: str) -> str:
        """Hash: a tenant's consumption on a day, see `protocol.queue.books.usage`. Written when requests end."""
        return f"{self.tag}:usage:{day}:{tenant}"

    def residency(self, day: int | str) -> str:
        """Hash: digest -> ms of a day during which the adapter was resident, summed over all workers."""
        return f"{self.tag}:resident:{day}"

    # The history of requests. Each key expires after the time of the settings since its last entry; MAXLEN bounds
    # streams.
    @property
    def histories(self) -> str:
        """Sorted set: tenant with a `history` -> unix ms when its last request ended."""
        return f"{self.tag}:hist"

    def history(self, tenant: str) -> str:
        """Stream: `messages.HistoryEntry` of a tenant's ended requests. Written by the scripts that end them."""
        return f"{self.tag}:hist:{tenant}"

    def refusals(self, tenant: str) -> str:
        """Stream: `messages.HistoryEntry` of a tenant's calls that a gateway refused."""
        return f"{self.tag}:hist:{tenant}:refused"

    def copied(self, tenant: str) -> str:
        """String: the ids of the last entries of `history` and `refusals` in the database, separated by a space."""
        return f"{self.tag}:hist:{tenant}:copied"

    @property
    def history_writer(self) -> str:
        """String PX 10 s: the gateway that writes the history's database."""
        return f"{self.tag}:hist-writer"

    @property
    def history_problem(self) -> str:
        """String PX 60 s: why the history writer cannot write the database."""
        return f"{self.tag}:hist-problem"

    @property
    def history_deleted(self) -> str:
        """Sorted set: `<tenant>:<rid>` whose text must be deleted from the database -> unix ms of that order."""
        return f"{self.tag}:hist-deleted"

    # The audit log: who did what. Its keys never expire; MAXLEN bounds each stream.
    @property
    def audit(self) -> str:
        """Stream: `audit.AuditEntry`, the actions of operators."""
        return f"{self.namespace}:audit"

    @property
    def tenants_audit(self) -> str:
        """Stream: `audit.AuditEntry`, the actions of tenants on their adapters."""
        return f"{self.namespace}:audit:tenants"

    # API keys. Permanent.
    @property
    def api_keys(self) -> str:
        """Hash: sha256 of a key -> `api_keys.ApiKey`. Written by operators."""
        return f"{self.namespace}:keys"

    @property
    def tenants(self) -> str:
        """Hash: tenant -> `api_keys.Tenant`, its limits. Written by operators."""
        return f"{self.namespace}:tenants"

    # Members of the fleet. Heartbeats expire; the sorted sets are cleaned by score.
    def worker_beat(self, wid: str) -> str:
        """String PX 4 s: `messages.WorkerBeat`."""
        return f"{self.namespace}:w:{wid}:hb"

    def gateway_beat(self, gid: str) -> str:
        """String PX 5 s: the gateway's address."""
        return f"{self.namespace}:gw:{gid}:hb"

    def store_beat(self, sid: str) -> str:
        """String PX 5 s: the store's base URL."""
        return f"{self.namespace}:store:{sid}:hb"

    @property
    def workers(self) -> str:
        """Sorted set wid -> last heartbeat, ms. Permanent, cleaned by the scheduler."""
        return f"{self.namespace}:workers"

    @property
    def gateways(self) -> str:
        """Sorted set gid -> last heartbeat, ms. Permanent, cleaned by the scheduler."""
        return f"{self.namespace}:gateways"

    @property
    def stores(self) -> str:
        """Sorted set sid -> last heartbeat, ms. Permanent, cleaned by the stores."""
        return f"{self.namespace}:stores"

    @property
    def leader(self) -> str:
        """String PX 3 s: the leading scheduler and its fencing epoch."""
        return f"{self.namespace}:leader"

    @property
    def leader_epoch(self) -> str:
        """Counter: how often a scheduler became the leader. Permanent."""
        return f"{self.namespace}:leader:epoch"

    @property
    def status(self) -> str:
        """String PX 5 s: `messages.SchedulerStatus`, the leader's view of the queue, for admission and `/metrics`."""
        return f"{self.namespace}:status"

    # Model and adapters. Permanent.
    @property
    def bases(self) -> str:
        """Hash: name -> `messages.ServedModel`, published by workers; NUL name -> why no worker of it has started."""
        return f"{self.namespace}:bases"

    @property
    def added_bases(self) -> str:
        """String: `messages.AddedBases`, written by gateways for operators."""
        return f"{self.namespace}:added_bases"

    @property
    def adapters(self) -> str:
        """Hash: name, or tenant NUL name for private ones -> `messages.Alias`. Written by adapter_store."""
        return f"{self.namespace}:adapters"

    @property
    def adapters_stamp(self) -> str:
        """String: a token that changes with every change of `adapters`. Written by adapter_store."""
        return f"{self.namespace}:adapters:stamp"

    def adapter(self, digest: str) -> str:
        """String: `messages.AdapterRecord`. Written by adapter_store."""
        return f"{self.namespace}:adapter:{digest}"

    @property
    def registrations(self) -> str:
        """Hash: field as in `adapters` -> `messages.Registration`, with tokens encrypted. Permanent."""
        return f"{self.namespace}:adapters:registered"

    def registered(self, tenant: str, minute: int | str) -> str:
        """Counter, 2 min: number of a tenant's registrations in a minute (of unix time)."""
        return f"{self.namespace}:adapters:new:{tenant}:{minute}"

    def fetching(self, name: str) -> str:
        """String PX 15 s: the store that is fetching the adapter of a registered name."""
        return f"{self.namespace}:adapters:fetching:{name}"

    @property
    def pins(self) -> str:
        """Hash: name of an adapter that workers keep resident -> who asked for that, "settings" or "api". Permanent."""
        return f"{self.namespace}:adapters:pins"

    def adapter_use(self, digest: str) -> str:
        """Hash: `records.AdapterUse`, incremented by workers. 7 days after the last use."""
        return f"{self.namespace}:use:{digest}"

    @property
    def adapter_events(self) -> str:
        """Stream: `messages.AdapterEvent`, store and workers -> all. MAXLEN."""
        return f"{self.namespace}:adapters:ev"

    def is_permanent(self, key: str) -> bool:
        """Return whether `key` may live without a TTL."""
        fixed = {
            self.ended, self.workers, self.gateways, self.stores, self.leader_epoch,
            self.bases, self.added_bases, self.adapters, self.adapters_stamp, self.registrations, self.pins,
            self.adapter_events, self.api_keys, self.tenants,
            self.file_expiry, self.open_batches, self.ends, self.outboxes, self.old_hooks, self.old_ends,
            self.old_cursor, self.old_deliveries, self.old_delivery_times, self.turns, self.audit, self.tenants_audit,
            *(self.sub(c) for c in CLASSES),
        }  # fmt: skip
        of_tenants = (self.hooks(""), self.ends_of(""), self.outbox(""), self.outbox_times(""))
        return key in fixed or key.startswith((f"{self.namespace}:adapter:", *of_tenants))


def private_name(name: str, tenant: str) -> str:
    """Return the catalogue's field for a name. Names contain no NUL, so no tenant's name can collide with another's."""
    return f"{tenant}\0{name}" if tenant else name
