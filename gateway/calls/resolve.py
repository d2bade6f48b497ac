"""*Resolve*, the second stage: look up the base model and the adapters that a call names."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from gateway.adapters.merged import MergedAdapters, merge_of_request
from gateway.adapters.resolver import CallTarget, Resolver, is_base
from gateway.auth.callers import Caller
from gateway.calls.parsed_call import Models, Pairs, ParsedCall
from gateway.fleet.view import FleetView
from peft_adapters.recipe import digest_of_merge
from protocol.wire import messages as m
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest, LorafleetError, Unavailable

T = TypeVar("T")

_NO_TEXT = {
    "embed": "Embedding models don't support text generation",
    "classify": "Classify models don't support text generation",
    "score": "Classify models don't support text generation",
}


class ResolvedCall(msgspec.Struct, frozen=True):
    """A call with its base and targets."""

    parsed: ParsedCall
    base: m.ServedModel
    targets: list[CallTarget]  # one per name of `parsed.models.names`


class CallResolver:
    """Resolves model names, waiting for adapters that are being fetched."""

    def __init__(self, fleet: FleetView, resolver: Resolver, timeout_s: float) -> None:
        """timeout_s: maximum seconds to wait for an adapter."""
        self._fleet = fleet
        self._resolver = resolver
        self._timeout_s = timeout_s

    async def resolve(self, call: ParsedCall) -> ResolvedCall:
        """Return a call with its base and targets.

        Raises Unavailable, BadRequest if the base model does not support the call, and ModelNotFound, PermissionDenied,
        AdapterRefused, or the errors by which the call's rules replace these.
        """
        base = await self.base_of(
            call.models, call.caller, worker=not call.options.background, refused=call.rules.refused_adapter
        )
        if not isinstance(call.inputs, Pairs):
            check_task(base, call.task)
        call.rules.check_base(call.options, base)
        targets = await self.targets(call.models, base, call.caller, call.rules.refused_adapter)
        if call.task == "score":
            call = with_heads(call, base, targets)
        elif call.task == "generate":
            refuse_classifiers(targets)
        if call.options.lora_scale is not None and not any(target.digest for target in targets):
            raise BadRequest(
                "lora_scale applies to adapters only; this request is for the base model", param="lora_scale"
            )
        return ResolvedCall(with_vocabulary(call, base, targets), base, targets)

    async def base_of(
        self,
        models: Models,
        caller: Caller,
        *,
        worker: bool,
        refused: Callable[[LorafleetError], LorafleetError] | None = None,
    ) -> m.ServedModel:
        """Return the base of a call's models: that of the first one. Raises as `targets`, and Unavailable.

        worker: raise Unavailable unless a worker of this base accepts calls now.
        """
        name = ""
        if self._fleet.further:
            if models.token:
                caller = replace(caller, token=models.token)
            for asked in (models.names[0], models.adapter):
                if not name:
                    finding = self._resolver.base_of(asked, models.source, self._timeout_s, caller)
                    name = await _refusing(finding, refused)
        return await self._fleet.require(worker=worker, name=name)

    async def targets(
        self,
        models: Models,
        base: m.ServedModel,
        caller: Caller,
        refused: Callable[[LorafleetError], LorafleetError] | None = None,
    ) -> list[CallTarget]:
        """Resolve all names concurrently. Raises as `resolve`. refused: replaces an error by another."""
        if models.token:
            caller = replace(caller, token=models.token)

        async def find(name: str) -> CallTarget:
            known = name if is_base(name, base) else await self._resolver.name_in(models.source, name, caller)
            if len(models.names) > 1 and self._fleet.further:
                named = await self._resolver.base_of(name, models.source, self._timeout_s, caller)
                other = await self._fleet.require(worker=False, name=named)
                if other.name != base.name:
                    text = f"the models of one call must be of one base: {brief(name)} is of {other.name}"
                    raise BadRequest(f"{text}, not {base.name}", param="model")
            return await self._resolver.resolve(known, base, self._timeout_s, caller)

        def of(name: str) -> Coroutine[Any, Any, CallTarget]:
            return _refusing(find(name), refused)

        names = models.names
        if models.adapter and all(is_base(name, base) for name in names):
            names = [models.adapter] * len(names)
        targets = [await of(names[0])] if len(names) == 1 else await asyncio.gather(*map(of, names))  # saves a task
        if models.adapter and names is models.names:
            named = await of(models.adapter)
            if other := [target.name for target in targets if target.name != named.name]:
                message = f"model is {brief(other[0])} and lora_path {brief(named.name)}: give only one of them"
                raise BadRequest(message, param="lora_path")
        if models.merged is None:
            return targets
        if len(targets) > 1 or targets[0].digest:
            raise BadRequest("with merged_adapters, model must be the base model", param="merged_adapters")
        return [_merged(models.merged, await asyncio.gather(*map(of, models.merged.ids)), targets[0])]


async def _refusing(finding: Awaitable[T], refused: Callable[[LorafleetError], LorafleetError] | None) -> T:
    """Return the awaited result; replace its error, unless Unavailable, by the one that `refused` returns."""
    try:
        return await finding
    except Unavailable:
        raise
    except LorafleetError as error:
        if refused is None:
            raise
        raise refused(error) from error


def _merged(merged: MergedAdapters, parts: list[CallTarget], base: CallTarget) -> CallTarget:
    """Return the target that merges several adapters. Raises BadRequest."""
    digest = digest_of_merge(merge_of_request(merged, [part.digest for part in parts]))
    sources = ",".join(sorted({part.source for part in parts}))
    return CallTarget(",".join(merged.ids), digest, base.files, source=sources)


DOES: Mapping[m.Task, str] = {
    "generate": "generates text",
    "embed": "computes embeddings",
    "classify": "labels tokens",
    "score": "labels texts",
}

_NEEDED: Mapping[m.Task, str] = {
    "generate": "text needs a generative model",
    "embed": "embeddings need an encoder",
    "classify": "labels need a token classifier",
    "score": "labels of texts need a sequence classifier",
}


def check_task(base: m.ServedModel, wanted: m.Task) -> None:
    """Raise BadRequest, with the reason, unless the base model supports the task."""
    if base.does(wanted):
        return
    if wanted == "generate":
        kind = "has no language modelling head" if base.does("embed") and base.tasks else "is an encoder"
        raise BadRequest(f"{_NO_TEXT[base.task]}: {base.name} {kind} ({base.model_type}) and {DOES[base.task]}")
    message = f"{base.name} ({base.model_type}) {DOES[base.task]}; {_NEEDED[wanted]} as base model"
    raise BadRequest(message, param="model")


def refuse_classifiers(targets: Sequence[CallTarget]) -> None:
    """Raise BadRequest for adapters that turn their base into a classifier: they generate no text."""
    for target in targets:
        if target.num_labels:
            message = f"{target.name} is a classifier of {target.num_labels} labels and generates no text"
            raise BadRequest(f"{message}: use /v1/classify", param="model")


def num_labels(base: m.ServedModel, target: CallTarget) -> int:
    """Return how many labels the target's or the base's classification head has; 0 if there is no head."""
    return (target.num_labels or len(base.labels)) if base.does("score") else 0


def with_vocabulary(call: ParsedCall, base: m.ServedModel, targets: Sequence[CallTarget]) -> ParsedCall:
    """Return the call with the vocabulary size set, if it asks for the logprobs of all tokens. Raises BadRequest."""
    sampling = call.options.sampling
    if m.WHOLE not in (sampling.num_logprobs, sampling.prompt_logprobs):
        return call
    sizes = {target.vocab_size or base.vocab_size for target in targets}
    if len(sizes) > 1:
        raise BadRequest("logprobs of the whole vocabulary: these models have different ones; ask one of them")
    sampling = msgspec.structs.replace(sampling, vocabulary=sizes.pop())
    return msgspec.structs.replace(call, options=msgspec.structs.replace(call.options, sampling=sampling))


def with_heads(call: ParsedCall, base: m.ServedModel, targets: Sequence[CallTarget]) -> ParsedCall:
    """Return a call for labels or scores as its targets can compute it; without a head, pairs become single texts.

    Raises BadRequest if a target supports neither.
    """
    pairs = call.inputs if isinstance(call.inputs, Pairs) else None
    for target in targets:
        num = num_labels(base, target)
        if pairs is not None and not num and base.does("embed"):
            call.rules.check_apart()
            return msgspec.structs.replace(call, task="embed", inputs=replace(pairs, apart=True))
        if not num and base.does("score"):
            raise BadRequest(f"{target.name} has no classification head: use an adapter that has one", param="model")
        if not num:
            message = f"{base.name} ({base.model_type}) {DOES[base.task]}; scores of pairs need a cross-encoder, a"
            raise BadRequest(f"{message} reranker or a model of embeddings as base model", param="model")
        if pairs is not None and num > 1:
            message = f"{target.name} has {num} labels, but scoring pairs needs exactly one: /v1/classify returns all"
            raise BadRequest(message, param="model")
    return call
