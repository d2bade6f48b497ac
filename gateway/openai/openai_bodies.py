"""The HTTP bodies of OpenAI's routes.

Fields that are not declared here are refused, see `gateway/bodies/parameters.toml`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from gateway.adapters.merged import MergedAdapters
from gateway.bodies.fields import BASE, REQUEST_ID, Name, Objects, Prompts, Strings, entries_within
from gateway.bodies.parameter_check import JsonBody
from gateway.http.paths import CHAT, COMPLETIONS

MAX_LORA_SCALE = 100.0

MAX_SALT_CHARACTERS = 128  # vLLM's limit

MAX_STOP_TOKEN_IDS = 1024
MAX_ALLOWED_TOKEN_IDS = 1 << 14
MAX_LOGPROB_TOKEN_IDS = 128  # vLLM's limit, as the next
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARACTERS = 128
MAX_TOOLS = 128  # OpenAI's limit, as the next three
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY = 64  # characters
MAX_METADATA_VALUE = 512  # characters

MAX_REPETITION_WINDOW = 4096
"""Maximum window of the repetition penalty, in tokens, unless it covers all: the window is sent with each token."""

MAX_ENTRIES = 1 << 14
"""Maximum entries of an object that are validated; `openai.parse` applies smaller limits of each field."""

Bias = Annotated[float, Field(ge=-100, le=100)]
Ids = Annotated[list[int], Field(fail_fast=True)]


class StreamOptions(JsonBody):
    """What a stream reports in addition to its text."""

    OBJECT = "stream_options"

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: with include_usage, every chunk reports the usage so far


class GenerationRequest(JsonBody):
    """The fields common to both routes. null always means the default."""

    model: Name | Annotated[list[Name], Field(min_length=1, fail_fast=True)] = BASE
    """Each model of a list has its own choices."""
    lora_scale: Annotated[float, Field(ge=-MAX_LORA_SCALE, le=MAX_LORA_SCALE)] | None = None
    merged_adapters: MergedAdapters | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None  # the context's length is the limit
    min_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    stop: str | Strings | None = None
    stop_token_ids: Ids | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=10)] | None = None  # this and the next are llama.cpp's and Ollama's
    repeat_last_n: Annotated[int, Field(ge=-1, le=MAX_REPETITION_WINDOW)] | None = None
    logit_bias: Annotated[dict[str, Bias], entries_within(MAX_ENTRIES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    service_tier: Literal["auto", "default", "flex"] | None = None
    background: bool | None = None
    metadata: Annotated[dict[str, str], entries_within(MAX_ENTRIES)] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None  # this and the next five are vLLM's until 2025
    guided_json_object: bool | None = None
    guided_regex: str | None = None
    guided_choice: Strings | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    regex: str | None = None  # this and the next two are SGLang's
    ebnf: str | None = None
    stop_regex: str | Strings | None = None
    lora_path: Name | None = None  # SGLang's: the adapter, if `model` is the base
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None  # this and the next ones are vLLM's
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool | None = None
    allowed_token_ids: Annotated[Ids, Field(min_length=1)] | None = None
    bad_words: Strings | None = None
    prompt_logprobs: Annotated[int, Field(ge=-1)] | None = None
    logprob_token_ids: Annotated[Ids, Field(min_length=1)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    include_metrics: bool | None = None
    echo: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARACTERS)] | None = None
    request_id: Annotated[str, Field(pattern=f"^{REQUEST_ID.pattern}$")] | None = None
    adapter_source: str | None = None  # this and the next two are LoRAX's
    api_token: str | None = None
    ignore_eos_token: bool | None = None


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    OBJECT = "chat"

    messages: Annotated[Objects, Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=-1)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Objects | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    guideline: str | None = None  # LoRAX's: a variable of some templates
    tools: Objects | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None  # vLLM's


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    OBJECT = "completions"

    prompt: Prompts
    best_of: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=-1)] | None = None
    json_schema: str | None = None  # SGLang's


AnyRequest = ChatRequest | CompletionRequest

BODIES: Mapping[str, type[AnyRequest]] = {
    CHAT: ChatRequest,
    COMPLETIONS: CompletionRequest,
}
"""Endpoint -> type of its body."""
