"""*Parse* for encoders: from a body to a `ParsedCall`. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.auth.callers import Caller
from gateway.bodies.fields import sources_of
from gateway.calls.parse import Models, Options, ParsedCall, Rules, Source, Texts
from gateway.encoders.bodies import EmbeddingsRequest, EncoderBatchRequest, EncoderRequest
from gateway.lorax.bodies import AdapterParameters
from gateway.lorax.errors import GenerationFailed
from gateway.lorax.parse import models_of
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, LorafleetError

OPTIONS = Options(sampling=m.Sampling(), output="numbers")


@dataclass(frozen=True, slots=True)
class EncoderRules(Rules):
    """What later stages refuse a call of an encoder for."""

    native: bool = False  # LoRAX's route, in LoRAX's words
    native_adapter: bool = False  # the adapter is named as LoRAX does
    dimensions: int | None = None

    def check_number(self, num_models: int, num_prompts: int, n: int) -> None:
        """Refuse a number of texts that is beyond the settings. Raises BadRequest."""
        if not num_prompts:
            raise BadRequest(f"{self.param} is an empty list", param=self.param)
        if num_prompts > self.max_choices:
            raise BadRequest(f"{self.param} has {num_prompts} texts; the limit is {self.max_choices}", param=self.param)

    def check_base(self, options: Options, base: m.ServedModel) -> None:
        """Refuse more entries than the model's vectors have. Raises BadRequest."""
        if self.dimensions is not None and self.dimensions > base.width:
            message = f"dimensions is {self.dimensions}; this model's embeddings have {base.width} entries"
            raise BadRequest(message, param="dimensions")

    def refused_adapter(self, error: LorafleetError) -> LorafleetError:
        """Return how it is told that an adapter cannot be served."""
        return GenerationFailed(error) if self.native_adapter else error

    def empty_prompt(self) -> BadRequest:
        """Return how it is told that a text is empty."""
        return BadRequest("`inputs` cannot be empty" if self.native else "input: a text is empty", param=self.param)

    def most_tokens(self, options: Options, num_prompt_tokens: int, max_model_len: int) -> int:
        """Return 0: no token is generated. Raises BadRequest for a text that is longer than the model takes."""
        if num_prompt_tokens <= max_model_len:
            return 0
        if self.native:
            message = f"`inputs` must have less than {max_model_len + 1} tokens. Given: {num_prompt_tokens}"
            raise BadRequest(message, param=self.param)
        message = f"input: a text has {num_prompt_tokens} tokens; this model takes at most {max_model_len}"
        raise BadRequest(message, param=self.param, code="context_length_exceeded")


def parse_embeddings(request: EmbeddingsRequest, caller: Caller, settings: Settings) -> ParsedCall:
    """Return what `/v1/embeddings` asks for. Raises BadRequest."""
    given = request.parameters
    models = Models([request.model]) if given is None else models_of(given)
    rules = EncoderRules(
        "input", settings.max_inputs, native_adapter=given is not None, dimensions=request.dimensions
    )  # fmt: skip
    return _call(caller, models, sources_of(request.input), "embed", rules)


def parse_native(
    request: EncoderRequest | EncoderBatchRequest, task: m.Task, caller: Caller, settings: Settings
) -> ParsedCall:
    """Return what a route of LoRAX's asks an encoder for. Raises BadRequest."""
    texts = request.inputs if isinstance(request, EncoderBatchRequest) else [request.inputs]
    rules = EncoderRules("inputs", settings.max_inputs, native=True, native_adapter=True)
    return _call(caller, models_of(request.parameters or AdapterParameters()), texts, task, rules)


def _call(caller: Caller, models: Models, sources: Sequence[Source], task: m.Task, rules: EncoderRules) -> ParsedCall:
    if not all(sources):
        raise rules.empty_prompt()  # however many special tokens the tokenizer would put around it
    texts = Texts(sources, with_offsets=task == "classify")
    return ParsedCall(caller, models, texts, OPTIONS, rules, task=task)
