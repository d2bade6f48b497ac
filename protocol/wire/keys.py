"""Every Redis key, built in one place. Life times are beside each key; `is_permanent` lists the keys without one."""

from __future__ import annotations

from dataclasses import dataclass

INTERACTIVE = "interactive"
BATCH = "batch"
CLASSES = (INTERACTIVE, BATCH)


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys of one fleet. All keys of a request share the hash tag `{shard}`, so that one script may touch them."""

    namespace: str = "lf"
    shard: str = "0"

    @property
    def tag(self) -> str:
        """Prefix of every sharded key; scripts build request keys from it."""
        return f"{self.namespace}:{{{self.shard}}}"

    # One request. All expire: deadline + 1 h, after the end 2 min (stored: 24 h, dead-lettered: 7 days).
    def req(self, rid: str) -> str:
        """Hash: state, epoch, owner and the other facts of a request. Written by scripts only."""
        return f"{self.tag}:req:{rid}"

    def call(self, rid: str) -> str:
        """Hash: how many requests of a call have not ended, by the id of its first, and what it costs its tenant.

        Until the last of them has ended; of stored ones what they cost their tenant lives on with their logs.
        """
        return f"{self.tag}:call:{rid}"

    def body(self, rid: str) -> str:
        """Hash: the `messages.Body` of a call, by the id of its first request; see `protocol.queue.calls`.

        Until the last request of the call has ended.
        """
        return f"{self.tag}:body:{rid}"

    def tok(self, rid: str) -> str:
        """String: output token ids, int32 little endian, appended by scripts."""
        return f"{self.tag}:tok:{rid}"

    def lp(self, rid: str) -> str:
        """String: logprob records, `messages.logprob_record_bytes` each, parallel to `tok`."""
        return f"{self.tag}:lp:{rid}"

    def plp(self, rid: str) -> str:
        """String: the prompt's tokens (int32), then their logprob records, the first NaN; with the first token."""
        return f"{self.tag}:plp:{rid}"

    # Work. One reader each, which remembers the last id it saw; an entry is deleted when its work is done and never
    # trimmed, so the stream is the list of what is not done yet. Bounded at admission.
    def sub(self, cls: str) -> str:
        """Stream: submitted requests of a class until they are assigned, gateway -> scheduler. Permanent."""
        return f"{self.tag}:sub:{cls}"

    def work(self, wid: str) -> str:
        """Stream: batches for one worker until all of a batch have ended. 1 h, renewed by the worker's beat."""
        return f"{self.tag}:w:{wid}:in"

    def own(self, wid: str) -> str:
        """Hash rid -> epoch: what a worker may write. 1 h after the last assignment; written by scripts only."""
        return f"{self.tag}:w:{wid}:own"

    # Control and events. Bounded streams.
    def ctl(self, wid: str) -> str:
        """Stream: `messages.Control` for one worker. Trimmed to 5 min; 1 h, renewed by the worker's beat."""
        return f"{self.tag}:w:{wid}:ctl"

    def out(self, gid: str) -> str:
        """Stream: packed `messages.Delta` lists for one gateway. Trimmed to 60 s; 5 min, renewed by the gateway."""
        return f"{self.tag}:out:{gid}"

    @property
    def ended(self) -> str:
        """Stream: `messages.Ended`, one entry a step at most, workers -> scheduler. MAXLEN, permanent."""
        return f"{self.tag}:ended"

    @property
    def dlq(self) -> str:
        """Stream: dead letters. 7 days."""
        return f"{self.tag}:dlq"

    # Jobs: 24 h.
    def job(self, jid: str) -> str:
        """Hash: `b`, a `messages.Job`, and `request`, what of its HTTP body writing its answer needs, as JSON."""
        return f"{self.tag}:job:{jid}"

    def jobs(self, tenant: str) -> str:
        """Sorted set: a tenant's job ids by creation time."""
        return f"{self.tag}:jobs:{tenant}"

    def idem(self, tenant: str, key: str) -> str:
        """String NX, 24 h: `messages.Idempotent`, the call that an Idempotency-Key was first used for."""
        return f"{self.tag}:idem:{tenant}:{key}"

    # Conversations. The first four live for the settings' time after the last change.
    def conversation(self, conversation_id: str) -> str:
        """Hash: `b`, a `messages.Conversation`; `tenant`; `bytes` of it all; `next`, the number of its next item."""
        return f"{self.tag}:conv:{conversation_id}"

    def conversation_items(self, conversation_id: str) -> str:
        """Hash: item id -> the item as JSON."""
        return f"{self.tag}:conv:{conversation_id}:items"

    def conversation_order(self, conversation_id: str) -> str:
        """Sorted set: item id -> its number."""
        return f"{self.tag}:conv:{conversation_id}:order"

    def conversation_turns(self, conversation_id: str) -> str:
        """Sorted set: id of a response that is to be added to the conversation -> unix ms when it was submitted."""
        return f"{self.tag}:conv:{conversation_id}:turns"

    def conversations(self, tenant: str) -> str:
        """Sorted set: conversation id -> unix ms when it expires. Until the last of them does."""
        return f"{self.tag}:convs:{tenant}"

    @property
    def turns(self) -> str:
        """Sorted set: `<tenant>:<conversation>:<response>` of all that are to be added -> unix ms of the next look.

        Permanent, cleaned by gateways.
        """
        return f"{self.tag}:turns"

    # Files and batches.
    def file(self, file_id: str) -> str:
        """String: `messages.File`. Until the file expires."""
        return f"{self.tag}:file:{file_id}"

    def files(self, tenant: str) -> str:
        """Sorted set: file id -> unix ms when it was made. Until the last of them expires."""
        return f"{self.tag}:files:{tenant}"

    def file_sizes(self, tenant: str) -> str:
        """Hash: file id -> bytes, and `sum` of all. Until the last of them expires."""
        return f"{self.tag}:files:{tenant}:sizes"

    @property
    def file_expiry(self) -> str:
        """Sorted set: `<tenant>:<file id>` -> unix ms when it expires. Permanent, cleaned by gateways."""
        return f"{self.tag}:file-expiry"

    def batch(self, batch_id: str) -> str:
        """Hash: `b` is `messages.Batch`; `owner` the gateway that runs it, `epoch` how many have; `cancel` unix ms.

        As long as the longest-lived files of the settings.
        """
        return f"{self.tag}:batch:{batch_id}"

    def batches(self, tenant: str) -> str:
        """Sorted set: batch id -> unix ms when it was made. Until the last of them expires."""
        return f"{self.tag}:batches:{tenant}"

    def open_batches_of(self, tenant: str) -> str:
        """Set: ids of a tenant's batches that have not ended. Until the last of them expires."""
        return f"{self.tag}:batches:{tenant}:open"

    @property
    def open_batches(self) -> str:
        """Sorted set: `<tenant>:<batch id>` -> unix ms until which a gateway runs it, 0 before one does. Permanent."""
        return f"{self.tag}:open-batches"

    # Webhooks: whatever waits is kept by tenant, and tenants take turns.
    def hooks(self, tenant: str) -> str:
        """Hash: endpoint id -> `messages.WebhookEndpoint` of a tenant. Permanent."""
        return f"{self.tag}:hooks:{tenant}"

    @property
    def ends(self) -> str:
        """Sorted set: tenant -> unix ms since which its oldest end waits, or of its last turn. Permanent."""
        return f"{self.tag}:ends"

    def ends_of(self, tenant: str) -> str:
        """Stream: ends of a tenant's jobs and batches that no deliveries were made of: `id`, `type`. Permanent."""
        return f"{self.tag}:ends:{tenant}"

    @property
    def outboxes(self) -> str:
        """Sorted set: tenant -> unix ms when its next delivery is due, or of its last turn. Permanent."""
        return f"{self.tag}:outboxes"

    def outbox(self, tenant: str) -> str:
        """Hash: delivery id -> `messages.Delivery`, until it has arrived or is given up. Permanent."""
        return f"{self.tag}:outbox:{tenant}"

    def outbox_times(self, tenant: str) -> str:
        """Sorted set: delivery id -> unix ms of its next attempt. Permanent."""
        return f"{self.tag}:outbox-due:{tenant}"

    # What the version before kept of all tenants together; `take_over.lua` empties it.
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
        """String: the last entry of `old_ends` that deliveries were made of. Permanent."""
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

    # A tenant's use. Written by the scripts that accept and end requests.
    def quota(self, tenant: str) -> str:
        """Hash: how much of a minute's requests and tokens is used, and when. Until all of it is available again."""
        return f"{self.tag}:q:{tenant}"

    def running(self, tenant: str) -> str:
        """Sorted set: rid -> unix ms after which it does not count any more. Until the last deadline."""
        return f"{self.tag}:q:{tenant}:run"

    def kept(self, tenant: str) -> str:
        """Sorted set: what the tenant keeps in the queue, `<call>:<bytes>` -> unix ms when it has expired; and `sum`.

        The score of `sum` is minus the bytes of all others. Until the last of them has expired.
        """
        return f"{self.tag}:q:{tenant}:kept"

    # Usage, for the books. Days are those since 1970, UTC; kept as many days as the settings say.
    def usage_tenants(self, day: int | str) -> str:
        """Set: the tenants of which there is a `usage` of a day."""
        return f"{self.tag}:usage:{day}"

    def usage(self, day: int | str, tenant: str) -> str:
        """Hash: what a tenant has used on a day, see `protocol.queue.books.usage`. Scripts write it at ends."""
        return f"{self.tag}:usage:{day}:{tenant}"

    def residency(self, day: int | str) -> str:
        """Hash: digest -> ms for which workers had it in their pools on a day, all workers together."""
        return f"{self.tag}:resident:{day}"

    # The history of requests. All live as long as the settings say after the last one; MAXLEN bounds each stream.
    @property
    def histories(self) -> str:
        """Sorted set: tenant with a `history` -> unix ms of the last end."""
        return f"{self.tag}:hist"

    def history(self, tenant: str) -> str:
        """Stream: `messages.HistoryEntry`, a tenant's requests that have ended. Scripts write it at ends."""
        return f"{self.tag}:hist:{tenant}"

    def refusals(self, tenant: str) -> str:
        """Stream: `messages.HistoryEntry`, a tenant's calls that a gateway refused."""
        return f"{self.tag}:hist:{tenant}:refused"

    def copied(self, tenant: str) -> str:
        """String: the last entries of `history` and `refusals`, a space between, that the history's database has."""
        return f"{self.tag}:hist:{tenant}:copied"

    @property
    def history_writer(self) -> str:
        """String PX 10 s: the gateway that writes the history's database."""
        return f"{self.tag}:hist-writer"

    @property
    def history_problem(self) -> str:
        """String PX 60 s: why that gateway cannot write it."""
        return f"{self.tag}:hist-problem"

    @property
    def history_deleted(self) -> str:
        """Sorted set: `<tenant>:<rid>` whose text is to be deleted from that database -> unix ms when it was asked."""
        return f"{self.tag}:hist-deleted"

    # The audit log: who did what. Its keys never expire; MAXLEN bounds each stream.
    @property
    def audit(self) -> str:
        """Stream: `audit.AuditEntry`, what operators have done."""
        return f"{self.namespace}:audit"

    @property
    def tenants_audit(self) -> str:
        """Stream: `audit.AuditEntry`, what tenants have done with their adapters."""
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

    # Members of the fleet. Heartbeats expire by themselves; the sorted sets are cleaned by score.
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
        """Counter of leaderships. Permanent."""
        return f"{self.namespace}:leader:epoch"

    @property
    def status(self) -> str:
        """String PX 5 s: `messages.SchedulerStatus`, the leader's view of the queue, for admission and `/metrics`."""
        return f"{self.namespace}:status"

    # Model and adapters. Permanent.
    @property
    def bases(self) -> str:
        """Hash: name -> `messages.ServedModel`, written by workers; NUL name -> why no worker of a base has started."""
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
        """String: another one after each change of `adapters`. Written by adapter_store."""
        return f"{self.namespace}:adapters:stamp"

    def adapter(self, digest: str) -> str:
        """String: `messages.AdapterRecord`. Written by adapter_store."""
        return f"{self.namespace}:adapter:{digest}"

    @property
    def registrations(self) -> str:
        """Hash: names as in `adapters` -> `messages.Registration`, with tokens encrypted. Permanent."""
        return f"{self.namespace}:adapters:registered"

    def registered(self, tenant: str, minute: int | str) -> str:
        """Counter, 2 min: what a tenant has registered in a minute (unix time)."""
        return f"{self.namespace}:adapters:new:{tenant}:{minute}"

    def fetching(self, name: str) -> str:
        """String PX 15 s: the store that fetches a registered name."""
        return f"{self.namespace}:adapters:fetching:{name}"

    @property
    def pins(self) -> str:
        """Hash: name of an adapter that workers keep in their pools -> asked for by "settings" or "api". Permanent."""
        return f"{self.namespace}:adapters:pins"

    def adapter_use(self, digest: str) -> str:
        """Hash: `records.AdapterUse`, added to by workers. 7 days after the last use."""
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
    """Return the catalogue's field for a name. Names hold no NUL, so nobody's name can look like another's."""
    return f"{tenant}\0{name}" if tenant else name
