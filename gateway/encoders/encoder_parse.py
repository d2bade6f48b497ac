"""*Parse* for encoders: convert a body to a `ParsedCall`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson

from gateway.auth.callers import Caller
from gateway.bodies.fields import sources_of
from gateway.calls.parsed_call import CallOptions, ChatPrompt, Models, Pairs, ParsedCall, Rules, Source, Texts
from gateway.encoders.encoder_bodies import (
    ClassifyRequest,
    EmbeddingsRequest,
    EncoderBatchRequest,
    EncoderRequest,
    RerankRequest,
    ScoreRequest,
)
from gateway.lorax.lorax_bodies import AdapterParameters
from gateway.lorax.lorax_errors import GenerationFailed
from gateway.lorax.lorax_parse import models_of
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, LorafleetError
from protocol.wire.keys import BATCH

OPTIONS = CallOptions(sampling=m.Sampling(), output="numbers")
IN_BACKGROUND = msgspec.structs.replace(OPTIONS, background=True, cls=BATCH)


@dataclass(frozen=True, slots=True)
class EncoderRules(Rules):
    """The checks of later stages for calls to encoders."""

    native: bool = False  # a route of LoRAX, with its error messages
    native_adapter: bool = False  # the adapter is given by LoRAX's parameters
    dimensions: int | None = None
    of_pairs: bool = False
    raw: bool = False  # logits are returned without activation
    as_base64: bool = False  # vectors are returned as base64

    def check_number(self, num_models: int, num_prompts: int, n: int) -> None:
        """Refuse more texts than the settings allow. Raises BadRequest."""
        if not num_prompts:
            raise BadRequest(f"{self.param} is an empty list", param=self.param)
        if num_prompts > self.max_choices:
            what = "pairs" if self.of_pairs else "texts"
            message = f"{self.param} has {num_prompts} {what}; the limit is {self.max_choices}"
            raise BadRequest(message, param=self.param)

    def check_base(self, options: CallOptions, base: m.ServedModel) -> None:
        """Refuse more dimensions than the model's vectors have. Raises BadRequest."""
        if self.dimensions is not None and self.dimensions > base.width:
            message = f"dimensions is {self.dimensions}; this model's embeddings have {base.width} entries"
            raise BadRequest(message, param="dimensions")

    def check_apart(self) -> None:
        """Refuse a request for logits if scores are cosines of vectors. Raises BadRequest."""
        if self.raw:
            message = "use_activation has no effect on this model: its scores are cosines of embeddings"
            raise BadRequest(message, param="use_activation")

    def refused_adapter(self, error: LorafleetError) -> LorafleetError:
        """Return the error for an adapter that cannot be served."""
        return GenerationFailed(error) if self.native_adapter else error

    def empty_prompt(self) -> BadRequest:
        """Return the error for an empty text."""
        message = "`inputs` cannot be empty" if self.native else f"{self.param}: a text is empty"
        return BadRequest(message, param=self.param)

    def most_tokens(self, options: CallOptions, num_prompt_tokens: int, max_model_len: int) -> int:
        """Return 0: no token is generated. Raises BadRequest for a text longer than the model's maximum."""
        if num_prompt_tokens <= max_model_len:
            return 0
        if self.native:
            message = f"`inputs` must have less than {max_model_len + 1} tokens. Given: {num_prompt_tokens}"
            raise BadRequest(message, param=self.param)
        what = "a pair" if self.of_pairs else "a text"
        message = f"{self.param}: {what} has {num_prompt_tokens} tokens; this model takes at most {max_model_len}"
        raise BadRequest(message, param=self.param, code="context_length_exceeded")


def parse_embeddings(request: EmbeddingsRequest, caller: Caller, settings: Settings) -> ParsedCall:
    """Return the call that a body of `/v1/embeddings` describes. Raises BadRequest."""
    given = request.parameters
    models = Models([request.model]) if given is None else models_of(given)
    rules = EncoderRules(
        "input",
        settings.max_inputs,
        native_adapter=given is not None,
        dimensions=request.dimensions,
        as_base64=request.encoding_format == "base64",
    )
    call = _call(caller, models, sources_of(request.input), "embed", rules)
    if not request.background:
        return call
    return msgspec.structs.replace(call, options=IN_BACKGROUND, model_name=request.model)


def to_be_stored(request: EmbeddingsRequest) -> bytes:
    """Return as JSON what `parse_stored` needs to write an answer: known fields, and the number of texts."""
    body = request.model_dump(exclude_none=True, exclude={"input"})
    return orjson.dumps({**body, "input": ["-"] * len(sources_of(request.input))})


def parse_stored(body: Mapping[str, Any], caller: Caller, settings: Settings) -> ParsedCall:
    """Parse a stored body of `/v1/embeddings`, given as JSON. Raises as `parse_embeddings`."""
    return parse_embeddings(EmbeddingsRequest.model_validate(body), caller, settings)


def parse_native(
    request: EncoderRequest | EncoderBatchRequest, task: m.Task, caller: Caller, settings: Settings
) -> ParsedCall:
    """Return the call that a body of LoRAX's encoder routes describes. Raises BadRequest."""
    texts = request.inputs if isinstance(request, EncoderBatchRequest) else [request.inputs]
    rules = EncoderRules("inputs", settings.max_inputs, native=True, native_adapter=True)
    return _call(caller, models_of(request.parameters or AdapterParameters()), texts, task, rules)


def _call(caller: Caller, models: Models, sources: Sequence[Source], task: m.Task, rules: EncoderRules) -> ParsedCall:
    if not all(sources):
        raise rules.empty_prompt()  # even if the tokenizer would add special tokens
    texts = Texts(sources, with_offsets=task == "classify")
    return ParsedCall(caller, models, texts, OPTIONS, rules, task=task)


# ---------------------------------------------------------------- labels and scores of texts

_OF_CHAT = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")


def parse_classify(request: ClassifyRequest, caller: Caller, settings: Settings) -> ParsedCall:
    """Return the call that a body of `/v1/classify` describes. Raises BadRequest."""
    param = "messages" if request.input is None else "input"
    rules = EncoderRules(param, settings.max_inputs)
    if request.input is None:
        if request.messages is None:
            raise BadRequest("input: it is missing, and so is messages", param="input")
        if len(request.messages) > settings.max_messages:
            message = f"messages has {len(request.messages)} entries; the limit is {settings.max_messages}"
            raise BadRequest(message, param="messages")
        if request.add_generation_prompt and request.continue_final_message:
            message = "continue_final_message and add_generation_prompt cannot be used together"
            raise BadRequest(message, param="continue_final_message")
        inputs = ChatPrompt(
            request.messages,
            request.chat_template_kwargs or {},
            add_generation_prompt=bool(request.add_generation_prompt),
            continue_final=bool(request.continue_final_message),
            add_special_tokens=bool(request.add_special_tokens),
        )
    else:
        for name in ("messages", *_OF_CHAT):
            if getattr(request, name) is not None:
                raise BadRequest(
                    f"{name} has no effect with input: it belongs to another form of this route", param=name
                )
        sources = sources_of(request.input)
        if not all(sources):
            raise rules.empty_prompt()
        inputs = Texts(sources, add_special_tokens=request.add_special_tokens is not False)
    return _scored(caller, request, inputs, rules)


def parse_rerank(request: RerankRequest, caller: Caller, settings: Settings) -> tuple[ParsedCall, list[str]]:
    """Return the call that a body of `/v1/rerank` describes, and the documents' texts. Raises BadRequest."""
    texts = [text_of(document, f"documents[{i}]") for i, document in enumerate(request.documents)]
    rules = EncoderRules("documents", settings.max_inputs, of_pairs=True, raw=request.use_activation is False)
    if not request.query:
        raise BadRequest("query is empty", param="query")
    if not all(texts):
        raise rules.empty_prompt()
    return _scored(
        caller, request, Pairs([request.query], texts, settings.max_call_tokens, request.max_tokens_per_doc), rules
    ), texts


def text_of(document: Any, place: str) -> str:
    """Return the text of a document: the string itself, or its field `text`. Raises BadRequest otherwise."""
    if isinstance(document, str):
        return document
    text = document.get("text") if isinstance(document, dict) else None
    if not isinstance(text, str):
        raise BadRequest(f"{place} must be a string, or an object with a string under text", param=place)
    if others := [name for name in document if name != "text"]:
        message = f"{place}.{others[0]:.64} has no effect: only a document's text is ranked"
        raise BadRequest(message, param=f"{place}.{others[0]:.64}", code="unsupported_parameter")
    return text


_NAMES = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))


def parse_score(request: ScoreRequest, caller: Caller, settings: Settings) -> tuple[ParsedCall, int]:
    """Return the call that a body of `/v1/score` describes, and the number of first texts. Raises BadRequest."""
    given = {name for pair in _NAMES for name in pair if getattr(request, name) is not None}
    names = next((pair for pair in _NAMES if given == set(pair)), None)
    if names is None:
        wanted = ", or ".join(" and ".join(pair) for pair in _NAMES)
        found = " and ".join(sorted(given)) or "nothing"
        raise BadRequest(f"the texts must be {wanted}, not {found}", param=next(iter(sorted(given)), "text_1"))
    firsts, seconds = ([one] if isinstance(one := getattr(request, name), str) else one for name in names)
    rules = EncoderRules(names[1], settings.max_inputs, of_pairs=True, raw=request.use_activation is False)
    rules.check_number(1, len(seconds), 1)
    if len(firsts) not in (1, len(seconds)):
        message = f"{names[0]} has {len(firsts)} texts and {names[1]} {len(seconds)}: they must be as many, or one"
        raise BadRequest(message, param=names[0])
    if not all(firsts) or not all(seconds):
        raise rules.empty_prompt()
    return _scored(caller, request, Pairs(firsts, seconds, settings.max_call_tokens), rules), len(firsts)


def _scored(
    caller: Caller,
    request: ClassifyRequest | RerankRequest | ScoreRequest,
    inputs: ChatPrompt | Texts | Pairs,
    rules: EncoderRules,
) -> ParsedCall:
    return ParsedCall(
        caller, Models([request.model]), inputs, OPTIONS, rules, task="score", cache_salt=request.cache_salt or ""
    )
