"""From an HTTP body to running requests: resolve the name, make tokens, check lengths, submit all or nothing."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec

from gateway.adapters.catalogue import Catalogue, Fleet, Target, is_base
from gateway.auth.callers import Caller
from gateway.auth.limits import RETRY_S, check_quota, limit_headers, limit_text
from gateway.calls.choices import Choice, Prompt
from gateway.calls.generation import Generation, Terms
from gateway.calls.replies import Replies
from gateway.calls.writers import ChatWriter, CompletionWriter, Head, Writer
from gateway.encoders.api import check_task
from gateway.http.sse import GenerationResponse
from gateway.lorax import metrics as lorax_metrics
from gateway.openai.api import (
    ChatRequest,
    CompletionRequest,
    Options,
    check_token_ids,
    choice_seed,
    fingerprint,
    max_new_tokens,
    options_of,
)
from gateway.overload.admission import Admission, Load
from gateway.text.answer_form import answer_grammar, form_of, marker_ids
from gateway.text.grammar_check import GrammarCheck
from gateway.text.structured import grammar_text
from gateway.text.tokenizer import ModelFiles
from protocol.queue.bus import Bus, RequestFacts, decode, now_ms
from protocol.queue.quota import Standing
from protocol.runtime.metrics import KIND_ADAPTER, KIND_BASE, PROMPT_TOKENS
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, IdempotencyKeyReused, NotFound, Overloaded

PREFIX_TOKENS = 128  # of a prompt, hashed for the scheduler's prefix affinity
ATTACHED_POLL_S = 0.1

AnyRequest = ChatRequest | CompletionRequest
Requests = list[tuple[m.Submit, m.Body]]
NO_IDEM = ("", m.Idempotent(body_hash="", created_ms=0, rids=[]))
"""Of a call without an Idempotency-Key; nothing keeps it."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a call is in the queue: for each prompt as many requests as choices are wanted."""

    caller: Caller
    options: Options
    targets: list[Target]
    prompts: list[Prompt]  # for each target every one
    limits: list[int]  # most output tokens, per prompt

    @property
    def digests(self) -> list[str]:
        return [target.digest for target in self.targets]

    @property
    def texts(self) -> list[str]:
        return [target.texts for target in self.targets]

    @property
    def opened(self) -> list[bool]:
        """Of each target, whether its prompt ends within the model's reasoning."""
        forms = [prompt.form for prompt in self.prompts[:: len(self.prompts) // len(self.targets)]]
        return [form is not None and form.opened for form in forms]

    def target_of(self, which: int) -> Target:
        """Return who answers a prompt."""
        return self.targets[which * len(self.targets) // len(self.prompts)]


@dataclass(frozen=True, slots=True)
class Prepared(Work):
    """A checked call of OpenAI's routes, ready to be submitted."""

    request: AnyRequest
    base: m.ServedModel


class Calls:
    """Makes requests of HTTP calls."""

    def __init__(
        self,
        settings: Settings,
        bus: Bus,
        files: ModelFiles,
        fleet: Fleet,
        catalogue: Catalogue,
        replies: Replies,
        grammars: GrammarCheck,
    ) -> None:
        self.settings = settings
        self.bus = bus
        self.files = files
        self.fleet = fleet
        self.catalogue = catalogue
        self.replies = replies
        self.grammars = grammars
        self.admission = Admission(settings)

    # ------------------------------------------------------------ a new call

    async def prepare(self, request: AnyRequest, caller: Caller) -> Prepared:
        """Check a request against the model, wait for its adapter and make its tokens.

        Raises what the client did wrong, and Unavailable.
        """
        options = options_of(request, self.settings)
        base = await self.fleet.require(worker=not options.background)
        self.admission.check_room(options.cls, self.fleet.status, now_ms())
        check_task(base, "generate")
        targets = await self._targets(request, base, caller)
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        prompts: list[Prompt] = []
        for target in targets:
            vocab_size = target.vocab_size or base.vocab_size
            check_token_ids(options, vocab_size)
            if isinstance(request, ChatRequest):
                prompts.append(await self._chat_prompt(request, options, target.files))
            else:
                prompts += await self._completion_prompts(request, options, target.files, vocab_size)
        if len(prompts) * options.n > self.settings.max_choices:
            asked = f"{len(prompts) // len(targets)} prompts for {len(targets)} models with n = {options.n}"
            message = f"{asked}; the limit is {self.settings.max_choices} choices"
            raise BadRequest(message, param="n")
        prompts = await self.constrained(prompts, options, param_of(request))
        limits = [max_new_tokens(options, prompt.num_tokens, base.max_model_len, param) for prompt in prompts]
        return Prepared(caller, options, targets, prompts, limits, request, base)

    async def _targets(self, request: AnyRequest, base: m.ServedModel, caller: Caller) -> list[Target]:
        timeout_s = self.settings.request_timeout_s
        if request.api_token:
            caller = replace(caller, token=request.api_token)
        names = [
            name if is_base(name, base) else await self.catalogue.name_in(request.adapter_source, name, caller)
            for name in request.models
        ]
        targets = await self.catalogue.resolve_all(names, base, timeout_s, caller)
        if request.merged_adapters is not None:
            if len(targets) > 1 or targets[0].digest:
                raise BadRequest("with merged_adapters, model must be the base model", param="merged_adapters")
            targets = [await self.catalogue.resolve_merged(request.merged_adapters, base, timeout_s, caller)]
        if request.lora_scale is not None and not any(target.digest for target in targets):
            raise BadRequest("lora_scale scales an adapter, and the base model has none", param="lora_scale")
        return targets

    async def answer(self, prepared: Prepared, endpoint: str, idem_key: str, raw: bytes) -> GenerationResponse:
        """Submit a call and return the response that follows it. Raises Overloaded, and Conflict on a reused key."""
        options, digests = prepared.options, prepared.digests
        call, created_ms = uuid.uuid4().hex, now_ms()
        terms = Terms(
            deadline_ms=created_ms + int(self.settings.request_timeout_s * 1000),
            eager=options.stream,
            durable=bool(idem_key),
            adapter=any(digests),
            empty=options.max_tokens == 0,
        )
        choices = self.choices(call, prepared.prompts, options)
        if terms.empty:
            return self._response(prepared.request, options, choices, terms, created_ms, digests)
        record = m.Idempotent(
            body_hash=body_hash(endpoint, raw), created_ms=created_ms, digests=digests, texts=prepared.texts,
            opened=prepared.opened,
            rids=[choice.rid for choice in choices],
        )  # fmt: skip
        requests = requests_of(
            prepared, call, terms.deadline_ms, self.files.eos_ids, gateway=self.replies.gid, stored=bool(idem_key)
        )
        response = self._response(prepared.request, options, choices, terms, created_ms, digests)
        earlier = await self.begin(response.generation, prepared, requests, (idem_key, record))
        if earlier is not None:
            return await self.attach(prepared.request, endpoint, earlier, raw)
        return response

    async def begin(
        self, generation: Generation, work: Work, requests: Requests, idem: tuple[str, m.Idempotent] = NO_IDEM
    ) -> m.Idempotent | None:
        """Submit what a generation follows. If that fails, or a key was used before, nobody listens to it any more.

        Returns and raises as `submit`.
        """
        try:
            earlier = await self.submit(work, requests, idem)
        except asyncio.CancelledError:
            await generation.close()  # the queue may have it, and nobody would take it out any more
            raise
        except BaseException:
            self.replies.unsubscribe(generation.mail)
            raise
        if earlier is not None:
            self.replies.unsubscribe(generation.mail)
            return earlier
        # What was accepted may not be refused when a queue that lost its last second is told of it again.
        generation.resubmit = partial(self.put, work, requests, idem, forced=True)
        return None

    async def submit(self, work: Work, requests: Requests, idem: tuple[str, m.Idempotent]) -> m.Idempotent | None:
        """Put a call's requests into the queue. Returns what its idempotency key, if any, was used for before.

        Raises Overloaded, and BadRequest for more than can ever be let in.
        """
        try:
            return await self._submit(work, requests, idem)
        finally:
            work.caller.preparation.end(submitted=True)

    async def _submit(self, work: Work, requests: Requests, idem: tuple[str, m.Idempotent]) -> m.Idempotent | None:
        load = load_of(work.options.cls, [submit for submit, _ in requests])
        quota, caller = work.caller.quota, work.caller
        if quota is not None:
            check_quota(quota, load.num, load.num_tokens)
        self.admission.check(load, self.fleet.status)
        outcome, value = await self.put(work, requests, idem)
        if outcome == "idem":
            return decode(value, m.Idempotent)
        if outcome == "full":
            self.admission.note_full(load, int(value), now_ms())
            raise self.admission.full(load, int(value), self.fleet.status)
        if isinstance(value, Standing):
            caller.headers.update(limit_headers(value))
            if value.over:
                assert quota is not None
                text = limit_text(quota, value, load.num, load.num_tokens)
                raise Overloaded(text, value.retry_ms / 1000 if value.retry_ms else RETRY_S)
        self.admission.note(load, now_ms())
        for which, prompt in enumerate(work.prompts):
            kind = KIND_ADAPTER if work.target_of(which).digest else KIND_BASE
            PROMPT_TOKENS.labels(kind).inc(prompt.num_tokens)
        lorax_metrics.accepted([prompt.num_tokens for prompt in work.prompts], work.limits)
        return None

    async def put(
        self, work: Work, requests: Requests, idem: tuple[str, m.Idempotent], *, forced: bool = False
    ) -> tuple[str, Any]:
        """Put requests into the queue, or find them there; see `Bus.submit`. `forced`: whatever the limits are."""
        key, record = idem
        return await self.bus.submit(
            work.options.cls, requests, max_queued=1 << 31 if forced else self.settings.max_queued,
            idem_key=self.idem_key(key, work.caller) if key else "", idem_value=m.encode(record) if key else b"",
            quota=work.caller.quota, forced=forced,
        )  # fmt: skip

    # ------------------------------------------------------------ a call that was submitted before

    def idem_key(self, key: str, caller: Caller) -> str:
        """Return the queue's key of a caller's Idempotency-Key."""
        return self.bus.keys.idem(caller.owner, key)

    async def earlier(self, key: str, caller: Caller) -> m.Idempotent | None:
        """Return what a caller first used an Idempotency-Key for, if it has."""
        return await self.bus.get(self.idem_key(key, caller), m.Idempotent)

    async def attach(self, request: AnyRequest, endpoint: str, record: m.Idempotent, raw: bytes) -> GenerationResponse:
        """Follow a call submitted before, from its first token. Raises ClientError when the body was another one."""
        check_same_body(record, endpoint, raw)
        options = options_of(request, self.settings)
        facts = await self.bus.requests(record.rids)
        files = await self.known_files(record.digests, record.texts)
        prompts = self.known_prompts(request, options, facts, files, record.opened)
        terms = Terms(
            deadline_ms=record.created_ms + int(self.settings.request_timeout_s * 1000),
            eager=options.stream,
            durable=True,
            poll_s=ATTACHED_POLL_S,
            adapter=any(record.digests),
        )
        choices = self.choices(call_of(record.rids[0]), prompts, options)
        return self._response(request, options, choices, terms, record.created_ms, record.digests)

    async def known_files(self, digests: Sequence[str], texts: Sequence[str]) -> list[ModelFiles]:
        """Return the files of those who answer submitted requests. Raises NotFound when they are gone."""
        return [await self.catalogue.own.files(digest, own) for digest, own in zip(digests, texts, strict=True)]

    def known_prompts(
        self,
        request: AnyRequest,
        options: Options,
        facts: Sequence[RequestFacts | None],
        answering: Sequence[ModelFiles],
        opened: Sequence[bool],
    ) -> list[Prompt]:
        """Return the prompts of submitted requests without tokenizing again. Raises NotFound when they have expired."""
        sources = prompt_sources(request) if isinstance(request, CompletionRequest) else [""]
        is_chat = isinstance(request, ChatRequest)
        forms = [
            form_of(files, options.tools, opened=i < len(opened) and opened[i]) if is_chat else None
            for i, files in enumerate(answering)
        ]
        pairs = [(files, form, source) for files, form in zip(answering, forms, strict=True) for source in sources]
        prompts: list[Prompt] = []
        for (files, form, source), fact in zip(pairs, facts[:: options.n], strict=True):
            if fact is None:
                raise NotFound("the result has expired", code="result_expired")
            echo = _echo_text(source, files) if options.echo else ""
            prompts.append(Prompt(b"", fact.num_prompt_tokens, echo, files, form=form))
        return prompts

    # ------------------------------------------------------------ parts

    def choices(self, call: str, prompts: Sequence[Prompt], options: Options) -> list[Choice]:
        """Return the choices of a call: for each model, for each prompt `n`, in the API's order."""
        return [Choice(i, rid_of(call, i), prompts[i // options.n], options) for i in range(len(prompts) * options.n)]

    def writer(
        self, request: AnyRequest, options: Options, choices: Sequence[Choice], created_ms: int, system_fingerprint: str
    ) -> Writer:
        """Return what writes this endpoint's answers."""
        call = call_of(choices[0].rid)
        shown = [choice for choice in choices if choice.index % options.n < (options.num_best or options.n)]
        kind = ChatWriter if isinstance(request, ChatRequest) else CompletionWriter
        head = Head(kind.id_prefix + call, created_ms // 1000, request.model_name, system_fingerprint)
        if isinstance(request.model, list):
            num = len(shown) // len(request.model)
            head = replace(head, model_of=[name for name in request.models for _ in range(num)])
        tokens = [choice.prompt.files.token_text for choice in shown]
        writer = kind(head, tokens, include_usage=options.include_usage, logprobs=options.shows_logprobs)
        if isinstance(writer, ChatWriter):
            writer.forms = {choice.index: (choice.prompt.form, choice.rid) for choice in choices if choice.prompt.form}
        return writer

    def _response(
        self,
        request: AnyRequest,
        options: Options,
        choices: Sequence[Choice],
        terms: Terms,
        created_ms: int,
        digests: Sequence[str],
    ) -> GenerationResponse:
        base = self.fleet.base
        mark = fingerprint(base, digests) if base is not None else ""
        writer = self.writer(request, options, choices, created_ms, mark)
        return GenerationResponse(
            Generation(self.replies, choices, terms),
            writer,
            stream=options.stream,
            include_usage=options.include_usage,
            keepalive_s=self.settings.keepalive_s,
        )

    async def constrained(self, prompts: Sequence[Prompt], options: Options, param: str) -> list[Prompt]:
        """Return prompts with the grammar of their answers. Raises BadRequest naming `param` if there can be none."""
        if options.constraint is None and options.tools is None:
            return list(prompts)
        made: list[Prompt] = []
        for prompt in prompts:
            marker = marker_ids(prompt.files)
            grammar = grammar_text(*answer_grammar(options.constraint, options.tools, prompt.form, marker))
            await self.grammars.check(grammar, param)
            made.append(replace(prompt, grammar=grammar))
        return made

    async def _chat_prompt(self, request: ChatRequest, options: Options, files: ModelFiles) -> Prompt:
        encoded = await files.encode_chat(
            request.messages,
            add_generation_prompt=request.add_generation_prompt is not False,
            variables=request.template_variables,
            tools=options.tools.definitions if options.tools is not None else None,
        )
        ids = encoded.ids
        if not ids:
            raise BadRequest("the chat template makes an empty prompt of these messages", param="messages")
        return Prompt(pack(ids), len(ids), "", files, form=form_of(files, options.tools, opened=encoded.opened))

    async def _completion_prompts(
        self, request: CompletionRequest, options: Options, files: ModelFiles, vocab_size: int
    ) -> list[Prompt]:
        sources = prompt_sources(request)
        if not sources:
            raise BadRequest("prompt is an empty list", param="prompt")
        texts = [source for source in sources if isinstance(source, str)]
        encoded = iter(await files.encode(texts) if texts else [])
        prompts: list[Prompt] = []
        for source in sources:
            ids = next(encoded) if isinstance(source, str) else source
            if not ids:
                raise BadRequest("a prompt is empty", param="prompt")
            if not isinstance(source, str) and not (min(ids) >= 0 and max(ids) < vocab_size):
                raise BadRequest(f"prompt: token ids must be from 0 to {vocab_size - 1}", param="prompt")
            prompts.append(Prompt(pack(ids), len(ids), _echo_text(source, files) if options.echo else "", files))
        return prompts


# ---------------------------------------------------------------- pure helpers


def requests_of(
    work: Work, call: str, deadline_ms: int, base_ends: frozenset[int], *, gateway: str, stored: bool
) -> Requests:
    """Return the queue's requests of a call, one per choice. `gateway` gets the tokens; "" if nobody listens.

    base_ends: tokens that end a text of the base model, which workers know.
    """
    options = work.options
    weight = work.caller.tenant.weight if work.caller.tenant is not None else 1.0
    requests: Requests = []
    for index in range(len(work.prompts) * options.n):
        which, sample = divmod(index, options.n)
        prompt, limit, target = work.prompts[which], work.limits[which], work.target_of(which)
        sampling = msgspec.structs.replace(options.sampling, seed=choice_seed(options.sampling.seed, sample))
        submit = m.Submit(
            rid=rid_of(call, index), tenant=work.caller.name or target.tenant, cls=options.cls, digest=target.digest,
            num_prompt_tokens=prompt.num_tokens, max_new_tokens=limit, deadline_ms=deadline_ms, gateway=gateway,
            stored=stored, submitted_ms=now_ms(), prefix=prefix_hash(prompt.ids), weight=weight,
        )  # fmt: skip
        own_ends = [] if sampling.ignore_eos else sorted(prompt.files.eos_ids - base_ends)
        body = m.Body(
            prompt=prompt.ids, sampling=sampling, max_new_tokens=limit, stop=options.stop,
            stop_token_ids=[*options.stop_token_ids, *own_ends],
            lora_scale=options.lora_scale if target.digest else 1.0, salt=work.caller.name, grammar=prompt.grammar,
        )  # fmt: skip
        requests.append((submit, body))
    return requests


def load_of(cls: str, submits: Sequence[m.Submit]) -> Load:
    """Return what requests of a class would add to the queue."""
    num_tokens = sum(submit.num_prompt_tokens + submit.max_new_tokens for submit in submits)
    return Load(cls, len(submits), num_tokens, (submits[0].deadline_ms - now_ms()) / 1000)


def param_of(request: AnyRequest) -> str:
    """Return the field that demands something of the output's form."""
    if isinstance(request, ChatRequest) and request.tools and request.tool_choice != "none":
        return "tools"
    return "response_format" if request.structured_outputs is None else "structured_outputs"


def _echo_text(source: str | list[int], files: ModelFiles) -> str:
    return source if isinstance(source, str) else files.tokenizer.decode(source)


def prompt_sources(request: CompletionRequest) -> list[str | list[int]]:
    """Return a completion request's prompts, as texts or token ids."""
    prompt: Any = request.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    return prompt


def rid_of(call: str, index: int) -> str:
    """Return the queue's id of a call's choice."""
    return f"{call}-{index}"


def call_of(rid: str) -> str:
    """Return the call that a request belongs to."""
    return rid.rpartition("-")[0]


def pack(ids: Sequence[int]) -> bytes:
    """Return token ids as int32."""
    return array("i", ids).tobytes()


def prefix_hash(ids: bytes) -> str:
    """Return a hash of a long prompt's beginning, "" for a short prompt."""
    size = PREFIX_TOKENS * 4
    return hashlib.blake2b(ids[:size], digest_size=8).hexdigest() if len(ids) >= size else ""


def body_hash(endpoint: str, raw: bytes) -> str:
    """Return what identifies a call's body."""
    return hashlib.sha256(endpoint.encode() + b"\0" + raw).hexdigest()


def check_same_body(record: m.Idempotent, endpoint: str, raw: bytes) -> None:
    """Refuse an Idempotency-Key that comes back with another body. Raises IdempotencyKeyReused (422)."""
    if record.body_hash != body_hash(endpoint, raw):
        raise IdempotencyKeyReused("this Idempotency-Key was used with another body")
