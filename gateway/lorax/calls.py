"""From a native HTTP body to running requests."""

from __future__ import annotations

import time
import uuid

from gateway.adapters.resolver import Target
from gateway.auth.callers import Caller
from gateway.calls.calls import Calls, Work, pack, requests_of, rid_of
from gateway.calls.choices import Prompt
from gateway.calls.generation import Generation, Terms
from gateway.encoders.api import check_task
from gateway.lorax.adapters import NativeAdapters
from gateway.lorax.answer import NativeChoice, NativeFacts, NativeResponse, NativeWriter, compute_type
from gateway.lorax.api import (
    AdapterParameters,
    GenerateRequest,
    NativeOptions,
    Parameters,
    native_limit,
    native_options,
)
from gateway.overload.admission import Load
from gateway.text.tokenizer import ModelFiles
from protocol.queue.bus import now_ms
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest


class NativeCalls:
    """Makes requests of native calls."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self.adapters = NativeAdapters(calls.resolver, calls.settings)

    async def answer(
        self, request: GenerateRequest, caller: Caller, started_s: float, *, stream: bool, as_list: bool
    ) -> NativeResponse:
        """Check a request, wait for its adapter, submit it, and return the response that follows it.

        caller: its token is for the adapter's source, unless the parameters have one. started_s: monotonic, of the
        request's arrival.
        Raises what the client did wrong, GenerationFailed, Overloaded and Unavailable.
        """
        calls, p = self._calls, request.parameters or Parameters()
        base = await calls.fleet.require(worker=True)
        check_task(base, "generate")
        native = native_options(request, calls.settings, base.max_model_len, stream=stream)
        calls.admission.check(Load(native.options.cls))
        target = await self.target(p, base, caller)
        prompt = await self._prompt(request.inputs, native, target.files)
        limit = native_limit(native.options, prompt.num_tokens, base.max_model_len)
        [prompt] = await calls.constrained([prompt], native.options, "response_format")
        work = Work(caller, native.options, [target], [prompt], [limit])
        facts = NativeFacts(
            model=base.name,
            adapter_id=target.name,
            adapter_source=target.source,
            compute_type=compute_type(base),
            num_characters=len(request.inputs),
            started_s=started_s,
            submitted_s=time.monotonic(),
        )
        writer = NativeWriter(target.files, native, request.inputs)
        writer.as_list, writer.num_prompt_tokens = as_list, prompt.num_tokens
        generation = await self._submit(work, eager=stream)
        return NativeResponse(generation, writer, facts, stream=stream, keepalive_s=calls.settings.keepalive_s)

    async def target(self, p: AdapterParameters, base: m.ServedModel, caller: Caller) -> Target:
        """Return what a request is for. Raises as `NativeAdapters.resolve`."""
        return await self.adapters.resolve(p, base, caller)

    async def _submit(self, work: Work, *, eager: bool) -> Generation:
        calls, options = self._calls, work.options
        call = uuid.uuid4().hex
        deadline_ms = now_ms() + int(calls.settings.request_timeout_s * 1000)
        choices = [NativeChoice(i, rid_of(call, i), work.prompts[0], options) for i in range(options.n)]
        terms = Terms(deadline_ms=deadline_ms, eager=eager, adapter=any(work.digests))
        generation = Generation(calls.replies, choices, terms)
        requests = requests_of(work, call, deadline_ms, calls.files.eos_ids, gateway=calls.replies.gid, stored=False)
        await calls.begin(generation, work, requests)
        return generation

    async def _prompt(self, inputs: str, native: NativeOptions, files: ModelFiles) -> Prompt:
        [ids] = await files.encode([inputs])
        if native.truncate is not None:
            ids = ids[-native.truncate :]
        if not ids:
            raise BadRequest("`inputs` cannot be empty", param="inputs")
        return Prompt(pack(ids), len(ids), "", files)
