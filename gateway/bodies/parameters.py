"""Every parameter that OpenAI, vLLM, SGLang, TGI, LoRAX, Ollama, Cohere, Jina or Anthropic documents for routes here.

This is the one list of what becomes of each: it is *served* (a field of the body declares it), *accepted* without
effect, or *refused*, which the 400 explains with the words here. What is not in it is unknown, and refused too
(`parameter_check.py`). A new field of a body, or a new body, has its row here;
`tests/gateway/bodies/test_parameters.py` checks that.
`docs/compat.md` is its table: `python -m gateway.bodies.compat` writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from gateway.http.paths import (
    BATCHES,
    CHAT,
    CLASSIFY,
    COMPLETIONS,
    COUNT_TOKENS,
    DETOKENIZE,
    EMBEDDINGS,
    MESSAGES,
    OLLAMA_CHAT,
    OLLAMA_EMBED,
    OLLAMA_GENERATE,
    RERANK,
    RESPONSES,
    SCORE,
    TOKENIZE,
    WEBHOOKS,
)

Fate = Literal["served", "accepted", "refused"]

SERVERS = ("openai", "vllm", "sglang", "tgi", "lorax", "ollama", "cohere", "jina", "anthropic")
"""The servers whose parameters are listed."""

OBJECTS: Mapping[str, str] = MappingProxyType({
    "chat": CHAT,
    "completions": COMPLETIONS,
    "embeddings": EMBEDDINGS,
    "labels": f"{CLASSIFY} and /classify",
    "rerank": " ".join(RERANK),
    "score": " ".join(SCORE),
    "generate": "/generate",
    "generate_stream": "/generate_stream",
    "compat": "/",
    "parameters": "parameters of LoRAX's routes",
    "encode": "/embed and /classify",
    "encode_batch": "/classify_batch",
    "adapter": "parameters of an encoder's routes",
    "tokenize": TOKENIZE,
    "detokenize": DETOKENIZE,
    "ollama_chat": OLLAMA_CHAT,
    "ollama_generate": OLLAMA_GENERATE,
    "ollama_options": "options of Ollama's routes",
    "ollama_embed": OLLAMA_EMBED,
    "ollama_show": "/api/show",
    "batch": BATCHES,
    "output_expiry": "output_expires_after",
    "messages": MESSAGES,
    "count_tokens": COUNT_TOKENS,
    "message": "an entry of messages of Anthropic's routes",
    "text_block": "a block of type text",
    "thinking_block": "a block of type thinking",
    "tool_use_block": "a block of type tool_use",
    "tool_result_block": "a block of type tool_result",
    "messages_tool": "an entry of tools of Anthropic's routes",
    "messages_tool_choice": "tool_choice of Anthropic's routes",
    "thinking": "thinking",
    "output_config": "output_config",
    "output_format": "output_config.format",
    "response": RESPONSES,
    "response_text": "text of /v1/responses",
    "response_format_text": "text.format of /v1/responses",
    "response_reasoning": "reasoning of /v1/responses",
    "response_tool": "an entry of tools of /v1/responses",
    "response_tool_choice": "tool_choice of /v1/responses",
    "message_item": "an item of type message",
    "reasoning_item": "an item of type reasoning",
    "function_call_item": "an item of type function_call",
    "function_call_output_item": "an item of type function_call_output",
    "item_reference_item": "an item of type item_reference",
    "input_text_part": "a part of type input_text",
    "output_text_part": "a part of type output_text",
    "refusal_part": "a part of type refusal",
    "reasoning_text_part": "a part of type reasoning_text",
    "summary_text_part": "a part of type summary_text",
    "webhook": WEBHOOKS,
    "webhook_change": f"{WEBHOOKS}/ID",
    "webhook_rotation": f"{WEBHOOKS}/ID/rotate_secret",
    "webhook_test": f"{WEBHOOKS}/ID/test",
    "register": "/v1/adapters",
    "load_lora": "/v1/load_lora_adapter",
    "unload_lora": "/v1/unload_lora_adapter",
    "stream_options": "stream_options",
    "merged_adapters": "merged_adapters",
    "response_format": "response_format",
    "json_schema": "response_format.json_schema",
    "structured_outputs": "structured_outputs",
    "tool": "an entry of tools",
    "function": "function of an entry of tools",
    "tool_choice": "tool_choice",
    "named_function": "function of a tool_choice",
    "allowed_tools": "tool_choice.allowed_tools",
    "allowed_tool": "an entry of tool_choice.allowed_tools.tools",
})  # fmt: skip
"""The JSON objects whose fields are parameters -> where each stands."""

BY_TYPE: Mapping[str, Mapping[str | None, str]] = MappingProxyType({
    "block": {kind: f"{kind}_block" for kind in ("text", "thinking", "tool_use", "tool_result")},
    "input_item": {
        None: "message_item",
        **{kind: f"{kind}_item" for kind in (
            "message", "reasoning", "function_call", "function_call_output", "item_reference",
        )},
    },
    "input_part": {kind: f"{kind}_part" for kind in (
        "input_text", "output_text", "refusal", "reasoning_text", "summary_text",
    )},
    "response_any_tool": {"function": "response_tool"},
    "any_tool": {None: "messages_tool", "custom": "messages_tool"},
})  # fmt: skip
"""Objects with a `type`: what they are called -> each type that is served -> which of `OBJECTS` that is.

Other types are refused by *parse*, with reasons.
"""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of one or more objects."""

    name: str
    objects: Sequence[str]  # of `OBJECTS`: where it is a field
    servers: frozenset[str]  # who knows it; none: only this project
    fate: Fate = "served"
    why: str = ""  # why it has no effect, or is refused: a sentence without its subject, the parameter
    neutral: Sequence[Any] = ()  # values at which a refused parameter has no effect, and is accepted; null always is
    holds: str = ""  # of `OBJECTS` or `BY_TYPE`: what its value is, or each entry of a list

    def has_effect(self, value: Any) -> bool:
        """Return whether the parameter would change anything at this value."""
        return self.fate == "refused" and value is not None and value not in self.neutral


_BOTH = "chat completions"
_NATIVE = "generate generate_stream compat"
_ENCODERS = "encode encode_batch"
_OLLAMA = "ollama_chat ollama_generate"
_ALL = "openai vllm sglang tgi lorax ollama"
_ANTHROPIC = "messages count_tokens"
_OWN = ""


def _rows(
    names: str, objects: str, servers: str, fate: Fate = "served", why: str = "", neutral: Sequence[Any] = (),
    holds: str = "",
) -> Iterable[Parameter]:  # fmt: skip
    """Return a parameter for each of the names."""
    for name in names.split():
        yield Parameter(name, objects.split(), frozenset(servers.split()), fate, why, neutral, holds)


def _accepted(names: str, objects: str, servers: str, why: str) -> Iterable[Parameter]:
    return _rows(names, objects, servers, "accepted", why)


def _refused(names: str, objects: str, servers: str, why: str, *neutral: Any) -> Iterable[Parameter]:
    return _rows(names, objects, servers, "refused", why, neutral)


_NO_BEAMS = "belongs to beam search, which is not supported: best_of of several sampled choices comes closest"
_NO_IMAGES = "is about images, sounds or videos, and only texts are served"
_NO_AUDIO = "asks for sound, and only texts are made"
_ONE_ENGINE = "says how one engine's processes share work, and nothing about the answer: leave it out"
_AT_OPENAI = "belongs to what runs at OpenAI: here the model and your own tools answer"
_KEPT = "is kept at Anthropic, and nothing is here: send the whole conversation"
_ELSEWHERE = "belongs to what runs at Anthropic: here the model and your own tools answer"
_LONG = "asks for a conversation to be shortened, which clients do themselves here"
_CHAT_ONLY = "is served on /v1/chat/completions only"
_CODE = "is code that the server would run, which no client may send"

PARAMETERS: Sequence[Parameter] = (
    # Chat and completions
    *_rows("model", _BOTH, _ALL),
    *_rows("messages", "chat", _ALL),
    *_rows("prompt", "completions", _ALL),
    *_rows("temperature top_p stop seed max_tokens frequency_penalty presence_penalty stream", _BOTH, _ALL),
    *_rows("max_completion_tokens", "chat", "openai vllm sglang"),
    *_rows("stream_options", _BOTH, "openai vllm sglang tgi ollama", holds="stream_options"),
    *_rows("n logprobs logit_bias", _BOTH, "openai vllm sglang tgi lorax"),
    *_rows("top_logprobs", "chat", "openai vllm sglang tgi"),
    *_rows("echo", "completions", "openai vllm sglang lorax"),
    *_rows("echo", "chat", "vllm"),
    *_rows("best_of", "completions", "openai vllm sglang lorax"),
    *_rows("top_k", _BOTH, "vllm sglang lorax"),
    *_rows("repetition_penalty", _BOTH, "vllm sglang lorax"),
    *_rows("min_p min_tokens stop_token_ids ignore_eos", _BOTH, "vllm sglang"),
    *_rows("typical_p", _BOTH, _OWN),
    *_rows("response_format", _BOTH, "openai vllm sglang tgi lorax ollama", holds="response_format"),
    *_rows("structured_outputs", _BOTH, "vllm", holds="structured_outputs"),
    *_rows("tools", "chat", _ALL, holds="tool"),
    *_rows("tool_choice", "chat", _ALL, holds="tool_choice"),
    *_rows("parallel_tool_calls", "chat", "openai vllm"),
    *_rows("chat_template_kwargs", "chat", "vllm sglang"),
    *_rows("documents", "chat", "vllm"),
    *_rows("reasoning_effort", "chat", "openai vllm sglang ollama"),
    *_rows("include_stop_str_in_output truncate_prompt_tokens truncation_side add_special_tokens request_id", _BOTH,
           "vllm"),
    *_rows("allowed_token_ids bad_words prompt_logprobs logprob_token_ids return_token_ids return_tokens_as_token_ids",
           _BOTH, "vllm"),
    *_rows("skip_special_tokens cache_salt", _BOTH, "vllm sglang"),
    *_rows("guided_json guided_json_object guided_regex guided_choice guided_grammar guided_whitespace_pattern", _BOTH,
           "vllm"),
    *_rows("regex ebnf", _BOTH, "sglang"),
    *_rows("json_schema", "completions", "sglang"),
    *_accepted("guided_decoding_backend", _BOTH, "vllm", "names a program: here one enforces every form"),
    *_accepted("spaces_between_special_tokens", _BOTH, "vllm", "has an effect with decoders that write a space before"
               " each word: special tokens are shown as they are spelled here, without one"),
    *_refused("extra_key", _BOTH, "sglang", "is not supported: cache_salt keeps prefixes apart"),
    *_rows("add_generation_prompt", "chat", "vllm"),
    *_rows("continue_final_message", "chat", "vllm sglang"),
    *_rows("guideline", "chat", "tgi lorax"),
    *_rows("service_tier metadata", _BOTH, "openai"),
    *_rows("background", _BOTH, _OWN),
    *_rows("adapter_source api_token ignore_eos_token", _BOTH, "lorax"),
    *_rows("merged_adapters", _BOTH, _OWN, holds="merged_adapters"),
    *_rows("lora_scale", _BOTH, _OWN),
    *_accepted("user", "chat completions embeddings", "openai vllm sglang lorax ollama",
               "names an end user to OpenAI's abuse detection, and never changes an answer"),
    *_accepted("safety_identifier", _BOTH, "openai", "is for OpenAI's abuse detection, and never changes an answer"),
    *_accepted("store", _BOTH, "openai", "asks OpenAI to keep the answer; with background this server does"),
    *_accepted("prompt_cache_key prompt_cache_retention prompt_cache_options", _BOTH, "openai",
               "advises OpenAI's prompt cache; here prompts that begin alike share it by themselves"),
    *_accepted("prediction", "chat", "openai", "may only save time: an answer is the same without it"),
    *_accepted("session_id", _BOTH, "vllm", "advises a router; here prompts that begin alike meet by themselves"),
    *_accepted("stream_interval", _BOTH, "vllm", "says how many tokens share an event; here those of a step do"),
    *_accepted("return_mm_kwargs return_token_offsets", _BOTH, "vllm",
               "is about vLLM's routes that only render, and on this one vLLM ignores it too"),
    *_accepted("custom_labels", "completions", "sglang", "labels the server's metrics, and never changes an answer"),
    *_refused("functions", "chat", "openai", "was replaced by tools, which are served", []),
    *_refused("function_call", "chat", "openai", "was replaced by tool_choice, which is served", "auto", "none"),
    *_refused("modalities", "chat", "openai", "may only ask for text", ["text"]),
    *_refused("audio", "chat", "openai", _NO_AUDIO),
    *_refused("web_search_options", "chat", "openai", "asks for a search of the web, which a model here cannot do"),
    *_refused("moderation", "chat", "openai", "asks for a filter of contents, and there is none"),
    *_refused("verbosity", "chat", "openai", "is a trained ability of OpenAI's models: say it in a message", "medium"),
    *_refused("reasoning", "chat", "sglang ollama",
              "is not passed on by itself: a template that has such a variable takes it in chat_template_kwargs"),
    *_refused("best_of", "chat", "vllm", "is served on /v1/completions only", 1),
    *_refused("suffix", "completions", "openai vllm sglang lorax ollama",
              "asks for a text between two others, for which no model here is trained", ""),
    *_refused("use_beam_search", _BOTH, "vllm", _NO_BEAMS, False),
    *_refused("length_penalty", _BOTH, "vllm", _NO_BEAMS, 1),
    *_refused("early_stopping", _BOTH, "vllm", _NO_BEAMS, False),
    *_refused("prompt_embeds", "completions", "vllm", "skips the vocabulary: prompts are texts or token ids", []),
    *_refused("no_stop_trim", _BOTH, "sglang", "is served as include_stop_str_in_output", False),
    *_refused("chat_template", "chat", "vllm", _CODE + ": the model's or the adapter's own template is used"),
    *_refused("stop_regex", _BOTH, "sglang", "is not supported; stop strings are"),
    *_refused("lora_path", _BOTH, "sglang", "is not supported: model names the adapter"),
    *_refused("rid", _BOTH, "sglang", "is not supported: X-Request-Id is answered with"),
    *_refused("priority", _BOTH, "vllm sglang", "is not supported: service_tier flex is the lower class", 0),
    *_refused("include_reasoning separate_reasoning stream_reasoning", "chat", "vllm sglang",
              "is always so: the reasoning of a model comes apart from its answer", True),
    *_refused("thinking_token_budget", _BOTH, "vllm", "is not supported: only the whole answer has a limit", -1),
    *_refused("watermarking", _BOTH, "vllm", "is served on LoRAX's routes only, as watermark", False),
    *_refused("repetition_detection", _BOTH, "vllm", "is not supported; the penalties prevent repetitions"),
    *_refused("return_prompt_text", "chat", "vllm", "is not supported", False),
    *_refused("return_hidden_states return_routed_experts", _BOTH, "sglang", "asks for inner numbers", False),
    *_refused("routed_experts_prompt_start", _BOTH, "vllm", "asks for inner numbers", 0),
    *_refused("mm_processor_kwargs media_io_kwargs", "chat", "vllm", _NO_IMAGES, {}),
    *_refused("kv_transfer_params ec_transfer_params vllm_xargs", _BOTH, "vllm", _ONE_ENGINE, {}),
    *_refused("bootstrap_host bootstrap_port bootstrap_room session_params", _BOTH, "sglang", _ONE_ENGINE),
    *_refused("custom_logit_processor custom_params", _BOTH, "sglang", _CODE),
    *_refused("tool_prompt", "chat", "tgi", "is not supported: the template explains tools, or a system message"),
    # What they hold
    *_rows("include_usage", "stream_options", "openai vllm sglang tgi ollama"),
    *_rows("continuous_usage_stats", "stream_options", "vllm sglang"),
    *_accepted("include_obfuscation", "stream_options", "openai",
               "pads the events of a stream against eavesdroppers, which no client reads"),
    *_rows("ids weights merge_strategy density majority_sign_method", "merged_adapters", "lorax"),
    *_rows("svd_rank seed arithmetic", "merged_adapters", _OWN),
    *_rows("type", "response_format", _ALL),
    *_rows("json_schema", "response_format", "openai vllm sglang ollama", holds="json_schema"),
    *_rows("schema", "response_format", "lorax"),
    *_rows("value", "response_format", "tgi"),
    *_refused("format structures triggers", "response_format", "vllm sglang", "belongs to structural tags, which are"
              " not supported"),
    *_rows("schema", "json_schema", "openai vllm sglang ollama"),
    *_accepted("name description", "json_schema", "openai vllm sglang ollama", "is for the reader of a request"),
    *_rows("strict", "json_schema", "openai vllm sglang ollama"),
    *_rows("json regex choice grammar json_object whitespace_pattern disable_any_whitespace"
           " disable_additional_properties", "structured_outputs", "vllm"),
    *_refused("structural_tag", "structured_outputs", "vllm", "is not supported", False),
    *_accepted("disable_fallback", "structured_outputs", "vllm", "is always so: there is one program for grammars"),
    *_rows("type", "tool", _ALL),
    *_rows("function", "tool", _ALL, holds="function"),
    *_accepted("cache_control", "tool", _OWN, "advises the prompt cache of Anthropic, which some clients write for"),
    *_refused("defer_loading", "tool function", "vllm", "asks for a search among tools", False),
    *_rows("name description parameters", "function", _ALL),
    *_rows("strict", "function", "openai vllm sglang"),
    *_rows("type", "tool_choice", _ALL),
    *_rows("function", "tool_choice", _ALL, holds="named_function"),
    *_rows("allowed_tools", "tool_choice", "openai", holds="allowed_tools"),
    *_rows("name", "named_function", _ALL),
    *_rows("mode", "allowed_tools", "openai"),
    *_rows("tools", "allowed_tools", "openai", holds="allowed_tool"),
    *_rows("type", "allowed_tool", "openai"),
    *_rows("function", "allowed_tool", "openai", holds="named_function"),
    # Embeddings
    *_rows("input model encoding_format dimensions", "embeddings", "openai vllm sglang ollama"),
    *_rows("parameters", "embeddings", "lorax", holds="adapter"),
    *_rows("background", "embeddings", _OWN),
    *_refused("truncate_prompt_tokens truncation_side", "embeddings", "vllm", "is not supported"),
    *_refused("add_special_tokens normalize use_activation", "embeddings", "vllm", "is always so", True),
    *_refused("embed_dtype", "embeddings", "vllm", "is not supported: embeddings are float32", "float32"),
    *_refused("endianness", "embeddings", "vllm", "is not supported: base64 is little-endian", "native", "little"),
    *_refused("messages", "embeddings", "vllm", "is not supported: no template is rendered for an embedding"),
    *_refused("priority", "embeddings", "vllm sglang", "is not supported", 0),
    *_refused("request_id", "embeddings", "vllm", "is not supported: X-Request-Id is answered with"),
    *_refused("rid", "embeddings", "sglang", "is not supported: X-Request-Id is answered with"),
    *_refused("mm_processor_kwargs", "embeddings", "vllm", _NO_IMAGES, {}),
    # Labels and scores
    *_rows("model", "labels score", "vllm sglang"),
    *_rows("model query documents top_n", "rerank", "vllm sglang cohere jina"),
    *_rows("return_documents", "rerank", "sglang cohere jina"),
    *_rows("max_tokens_per_doc", "rerank", "cohere"),
    *_rows("input", "labels", "vllm sglang"),
    *_rows("messages add_special_tokens add_generation_prompt continue_final_message chat_template_kwargs", "labels",
           "vllm"),
    *_rows("text_1 text_2 queries documents items data_1 data_2", "score", "vllm"),
    *_rows("use_activation cache_salt", "labels rerank score", "vllm"),
    *_accepted("user", "labels rerank score", "vllm sglang",
               "names an end user to the server's operator, and never changes an answer"),
    *_refused("activation softmax", "labels rerank score", "vllm", "was replaced by use_activation, which is served",
              True),
    *_refused("truncate_prompt_tokens truncation_side", "labels rerank score", "vllm",
              "is not supported: what is longer than the model takes is refused"),
    *_refused("padding", "labels rerank score", "vllm", "is not supported: no text is padded", "do_not_pad"),
    *_refused("priority", "labels rerank score", "vllm cohere", "is not supported", 0),
    *_refused("request_id", "labels rerank score", "vllm", "is not supported: X-Request-Id is answered with"),
    *_refused("rid", "labels", "sglang", "is not supported: X-Request-Id is answered with"),
    *_refused("mm_processor_kwargs media_io_kwargs", "labels rerank score", "vllm", _NO_IMAGES, {}),
    *_refused("chat_template", "labels", "vllm", _CODE + ": the model's or the adapter's own template is used"),
    *_refused("query label_token_ids apply_softmax item_first", "score", "sglang",
              "is of SGLang's form, by likely tokens: a pair is text_1 and text_2, or queries and documents"),
    *_refused("encoding_format", "rerank score", "vllm", "is not supported: scores are JSON numbers", "float"),
    *_refused("truncation", "rerank", "jina", "is not supported: max_tokens_per_doc is", False),
    *_refused("return_embeddings", "rerank", "jina", "is not supported: /v1/embeddings has vectors", False),
    *_refused("rank_fields", "rerank", "cohere", "is not supported: of a document only its text is ranked", ["text"]),
    *_refused("max_chunks_per_doc", "rerank", "cohere",
              "is not supported: documents are not cut into chunks; max_tokens_per_doc is"),
    *_refused("instruction", "rerank", "sglang", "is not supported: a reranker's template has its instruction"),
    # LoRAX's and TGI's native routes
    *_rows("inputs", _NATIVE, "tgi lorax"),
    *_rows("parameters", _NATIVE, "tgi lorax", holds="parameters"),
    *_rows("stream", "compat", "tgi lorax"),
    *_refused("stream", "generate", "tgi lorax", "is not supported here: /generate_stream and / stream", False),
    *_accepted("stream", "generate_stream", "tgi lorax", "has no effect: this route always streams"),
    *_rows("adapter_id", "parameters adapter", "tgi lorax"),
    *_rows("adapter_source api_token", "parameters adapter", "lorax"),
    *_rows("merged_adapters", "parameters adapter", "lorax", holds="merged_adapters"),
    *_rows("best_of temperature repetition_penalty frequency_penalty top_k top_p typical_p do_sample max_new_tokens",
           "parameters", "tgi lorax"),
    *_rows("return_full_text stop truncate watermark details decoder_input_details seed", "parameters", "tgi lorax"),
    *_rows("presence_penalty ignore_eos_token return_k_alternatives", "parameters", "lorax"),
    *_rows("response_format", "parameters", "lorax", holds="response_format"),
    *_rows("grammar", "parameters", "tgi"),
    *_accepted("apply_chat_template", "parameters", "lorax", "is a field that LoRAX reads and never uses"),
    *_refused("top_n_tokens", "parameters", "tgi", "is not supported: return_k_alternatives is", 0),
    # Encoders, tokenizers
    *_rows("inputs", _ENCODERS, "tgi lorax"),
    *_rows("parameters", _ENCODERS, "lorax", holds="adapter"),
    *_refused("stream", _ENCODERS, "lorax", "is not supported here: the answer comes at once", False),
    *_rows("inputs", "tokenize", "tgi lorax"),
    *_rows("add_special_tokens", "tokenize", "vllm sglang lorax"),
    *_rows("prompt model", "tokenize", "vllm sglang"),
    *_rows("messages return_token_strs add_generation_prompt continue_final_message chat_template_kwargs", "tokenize",
           "vllm"),
    *_rows("tools", "tokenize", "vllm", holds="tool"),
    *_refused("chat_template", "tokenize", "vllm", _CODE + ": the model's or the adapter's own template is used"),
    *_refused("mm_processor_kwargs media_io_kwargs", "tokenize", "vllm", _NO_IMAGES, {}),
    *_rows("tokens model", "detokenize", "vllm sglang"),
    *_refused("skip_special_tokens", "detokenize", "sglang", "is not supported: special tokens are shown", False),
    *_rows("adapter_id adapter_source api_token", "tokenize", _OWN),
    *_rows("merged_adapters", "tokenize", _OWN, holds="merged_adapters"),
    # Ollama
    *_rows("model stream format think logprobs top_logprobs", _OLLAMA, "ollama"),
    *_rows("options", _OLLAMA, "ollama", holds="ollama_options"),
    *_rows("messages", "ollama_chat", "ollama"),
    *_rows("tools", "ollama_chat", "ollama", holds="tool"),
    *_rows("prompt system raw", "ollama_generate", "ollama"),
    *_accepted("keep_alive", f"{_OLLAMA} ollama_embed", "ollama",
               "says how long a model stays in memory: here adapters make room for others by themselves"),
    *_refused("template", "ollama_generate", "ollama", _CODE + ": the model's or the adapter's own template is used",
              ""),
    *_refused("suffix", "ollama_generate", "ollama",
              "asks for a text between two others, for which no model here is trained", ""),
    *_refused("images", "ollama_generate", "ollama", _NO_IMAGES, []),
    *_refused("context", "ollama_generate", "ollama",
              "is not kept: /api/chat takes the messages of a conversation", []),
    *_refused("width height steps", "ollama_generate", "ollama", _NO_IMAGES, 0),
    *_refused("truncate", f"{_OLLAMA} ollama_embed", "ollama",
              "is not supported: what is longer than the context is refused", False),
    *_refused("shift", _OLLAMA, "ollama", "is not supported: an answer ends where the context does", False),
    *_rows("temperature top_p top_k min_p typical_p seed num_predict num_ctx stop repeat_penalty presence_penalty"
           " frequency_penalty", "ollama_options", "ollama"),
    *_refused("repeat_last_n", "ollama_options", "ollama",
              "is not supported: repeat_penalty counts all of the prompt and the answer", -1),
    *_refused("mirostat", "ollama_options", "ollama", "is not supported: min_p or typical_p adapts to a text too", 0),
    *_accepted("mirostat_tau mirostat_eta", "ollama_options", "ollama",
               "belongs to mirostat, which must be 0, and then has no effect"),
    *_refused("tfs_z", "ollama_options", "ollama", "is not supported: Ollama has no such sampling any more", 1),
    *_refused("penalize_newline", "ollama_options", "ollama", "is always so: penalties count every token", True),
    *_accepted("num_keep", "ollama_options", "ollama", "is about a context that is shifted, which none is here"),
    *_accepted("numa num_batch num_gpu main_gpu low_vram f16_kv logits_all vocab_only use_mmap use_mlock"
               " embedding_only num_thread", "ollama_options", "ollama",
               "says how a process loads a model, and never changes an answer"),
    *_rows("model input dimensions", "ollama_embed", "ollama"),
    *_accepted("options", "ollama_embed", "ollama", "is about loading and generating, and never changes a vector"),
    *_rows("model name", "ollama_show", "ollama"),
    *_refused("verbose", "ollama_show", "ollama", "asks for lists of a GGUF file, which there is none of", False),
    *_refused("system template options", "ollama_show", "ollama", "is not supported: nothing is changed here", "", {}),
    # Batches
    *_rows("input_file_id endpoint completion_window metadata", "batch", "openai"),
    *_rows("output_expires_after", "batch", "openai", holds="output_expiry"),
    *_rows("anchor seconds", "output_expiry", "openai"),
    # Anthropic
    *_rows("model", _ANTHROPIC, "vllm anthropic"),
    *_rows("messages", _ANTHROPIC, "vllm anthropic", holds="message"),
    *_rows("system", _ANTHROPIC, "vllm anthropic", holds="block"),
    *_rows("tools", _ANTHROPIC, "vllm anthropic", holds="any_tool"),
    *_rows("tool_choice", _ANTHROPIC, "vllm anthropic", holds="messages_tool_choice"),
    *_rows("thinking", _ANTHROPIC, "anthropic", holds="thinking"),
    *_rows("output_config", _ANTHROPIC, "vllm anthropic", holds="output_config"),
    *_rows("chat_template_kwargs", _ANTHROPIC, "vllm"),
    *_rows("max_tokens stop_sequences stream temperature top_p top_k", "messages", "vllm anthropic"),
    *_accepted("metadata", "messages", "vllm anthropic",
               "names an end user to Anthropic's abuse detection, and never changes an answer"),
    *_accepted("cache_control", f"{_ANTHROPIC} text_block tool_use_block tool_result_block messages_tool", "anthropic",
               "advises Anthropic's prompt cache; here prompts that begin alike share it by themselves"),
    *_refused("service_tier", "messages", "anthropic", "may not choose: there is one tier", "auto", "standard_only"),
    *_refused("speed", _ANTHROPIC, "anthropic", "may not choose: there is one speed", "standard"),
    *_refused("inference_geo", "messages", "anthropic", "names a region of Anthropic's"),
    *_refused("container", "messages", "anthropic", _ELSEWHERE),
    *_refused("mcp_servers", _ANTHROPIC, "anthropic", _ELSEWHERE, []),
    *_refused("context_management", _ANTHROPIC, "anthropic", _LONG, {}, {"edits": []},
              {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}),
    *_refused("compaction", _ANTHROPIC, "anthropic", _LONG),
    *_refused("thread", "messages", "anthropic", _KEPT),
    *_refused("diagnostics", "messages", "anthropic", _KEPT),
    *_refused("fallbacks fallback_credit_token billing_policy", "messages", "anthropic", "is about Anthropic's models"
              " and bills"),
    *_refused("output_format", _ANTHROPIC, "anthropic", "is served as output_config.format"),
    *_refused("kv_transfer_params", "messages", "vllm", _ONE_ENGINE, {}),
    *_rows("role", "message", "vllm anthropic"),
    *_rows("content", "message tool_result_block", "vllm anthropic", holds="block"),
    *_rows("type", "text_block thinking_block tool_use_block tool_result_block", "vllm anthropic"),
    *_rows("text", "text_block", "vllm anthropic"),
    *_refused("citations", "text_block", "anthropic", "refers to documents, and only texts are served", []),
    *_rows("thinking", "thinking_block", "vllm anthropic"),
    *_accepted("signature", "thinking_block", "vllm anthropic", "proves who wrote the thinking, which nobody asks for"
               " here: it is a text for the template"),
    *_rows("id name input", "tool_use_block", "vllm anthropic"),
    *_refused("caller", "tool_use_block", "anthropic", _ELSEWHERE, {"type": "direct"}),
    *_refused("toolset_name", "tool_use_block tool_result_block", "anthropic", "belongs to toolsets, which Anthropic's"
              " models alone are trained on"),
    *_rows("tool_use_id is_error", "tool_result_block", "vllm anthropic"),
    *_rows("type name description input_schema strict", "messages_tool", "vllm anthropic"),
    *_accepted("eager_input_streaming", "messages_tool", "anthropic", "is always so: arguments come as they are made"),
    *_refused("defer_loading", "messages_tool", "vllm anthropic", "asks for a search among tools", False),
    *_refused("allowed_callers", "messages_tool", "anthropic", _ELSEWHERE, ["direct"]),
    *_refused("input_examples", "messages_tool", "anthropic", "is not supported: a description may have examples", []),
    *_rows("type name disable_parallel_tool_use", "messages_tool_choice", "vllm anthropic"),
    *_rows("type budget_tokens display", "thinking", "anthropic"),
    *_rows("effort", "output_config", "vllm anthropic"),
    *_rows("format", "output_config", "vllm anthropic", holds="output_format"),
    *_refused("task_budget", "output_config", "anthropic", "is not supported: only the whole answer has a limit"),
    *_rows("type schema", "output_format", "vllm anthropic"),
    # Responses
    *_rows("model instructions temperature top_p stream", "response", "openai vllm sglang"),
    *_rows("input", "response", "openai vllm sglang", holds="input_item"),
    *_rows("tools", "response", "openai vllm sglang", holds="response_any_tool"),
    *_rows("tool_choice", "response", "openai vllm sglang", holds="response_tool_choice"),
    *_rows("parallel_tool_calls max_output_tokens top_logprobs include truncation service_tier metadata store"
           " background previous_response_id", "response", "openai vllm sglang"),
    *_rows("text", "response", "openai vllm", holds="response_text"),
    *_rows("reasoning", "response", "openai vllm sglang", holds="response_reasoning"),
    *_rows("seed chat_template_kwargs", "response", "vllm"),
    *_rows("top_k", "response", "vllm sglang"),
    *_rows("lora_scale", "response", _OWN),
    *_accepted("user", "response", "openai vllm sglang",
               "names an end user to OpenAI's abuse detection, and never changes an answer"),
    *_accepted("safety_identifier", "response", "openai",
               "is for OpenAI's abuse detection, and never changes an answer"),
    *_accepted("prompt_cache_key prompt_cache_retention prompt_cache_options", "response", "openai vllm",
               "advises OpenAI's prompt cache; here prompts that begin alike share it by themselves"),
    *_accepted("stream_options", "response", "openai",
               "pads the events of a stream against eavesdroppers, which no client reads"),
    *_refused("conversation", "response", "openai", "is not kept: previous_response_id goes on with a response"),
    *_refused("prompt", "response", "openai vllm", "names a template that is kept at OpenAI, and nothing is here"),
    *_refused("max_tool_calls", "response", "openai vllm sglang", _AT_OPENAI),
    *_refused("moderation", "response", "openai", "asks for a filter of contents, and there is none"),
    *_refused("context_management", "response", "openai", _LONG, []),
    *_refused("background_options access_programs", "response", "openai", "is about OpenAI's service"),
    *_refused("image", "response", "openai", _NO_IMAGES),
    *_refused("stop", "response", "sglang vllm", _CHAT_ONLY, []),
    *_refused("min_p frequency_penalty presence_penalty", "response", "sglang vllm", _CHAT_ONLY, 0),
    *_refused("repetition_penalty", "response", "sglang vllm", _CHAT_ONLY, 1),
    *_refused("priority", "response", "vllm sglang", "is not supported: service_tier flex is the lower class", 0),
    *_refused("structured_outputs", "response", "vllm", "is served as text.format, and on /v1/chat/completions"),
    *_refused("ignore_eos skip_special_tokens include_stop_str_in_output enable_response_messages", "response", "vllm",
              "is not supported", False),
    *_refused("request_id", "response", "vllm", "is not supported: X-Request-Id is answered with"),
    *_refused("cache_salt vllm_xargs mm_processor_kwargs previous_input_messages", "response", "vllm",
              "is not supported", {}),
    *_rows("format", "response_text", "openai vllm", holds="response_format_text"),
    *_refused("verbosity", "response_text", "openai vllm", "is a trained ability of OpenAI's models: say it in a"
              " message", "medium"),
    *_rows("type schema strict", "response_format_text", "openai vllm"),
    *_accepted("name description", "response_format_text", "openai vllm", "is for the reader of a request"),
    *_rows("effort", "response_reasoning", "openai vllm sglang"),
    *_refused("summary generate_summary", "response_reasoning", "openai vllm", "asks for a text about the reasoning: it"
              " is shown itself", "auto"),
    *_refused("context", "response_reasoning", "openai", "is what the model's template makes of it", "auto"),
    *_refused("mode", "response_reasoning", "openai", "may not choose: there is one mode", "standard"),
    *_rows("type name description parameters strict", "response_tool", "openai vllm sglang"),
    *_refused("defer_loading", "response_tool", "openai", "asks for a search among tools", False),
    *_refused("async", "response_tool function_call_item", "openai", _AT_OPENAI, False),
    *_refused("allowed_callers", "response_tool", "openai", _AT_OPENAI, ["direct"]),
    *_refused("output_schema", "response_tool", "openai", "is not supported: templates show no form of results"),
    *_rows("type name mode", "response_tool_choice", "openai vllm"),
    *_rows("tools", "response_tool_choice", "openai vllm", holds="response_tool_choice"),
    *_rows("type id", "message_item reasoning_item function_call_item function_call_output_item item_reference_item",
           "openai vllm"),
    *_accepted("status", "message_item reasoning_item function_call_item function_call_output_item", "openai vllm",
               "tells how far an item was, which no template asks"),
    *_rows("role", "message_item", "openai vllm"),
    *_rows("content", "message_item reasoning_item", "openai vllm", holds="input_part"),
    *_accepted("phase", "message_item", "openai", "is a mark that OpenAI's models are trained on"),
    *_rows("summary", "reasoning_item", "openai vllm", holds="input_part"),
    *_refused("encrypted_content", "reasoning_item", "openai vllm", "is encrypted, and OpenAI alone can read it"),
    *_rows("call_id", "function_call_item function_call_output_item", "openai vllm"),
    *_rows("name arguments", "function_call_item", "openai vllm"),
    *_refused("namespace", "function_call_item", "openai vllm", _AT_OPENAI),
    *_refused("caller", "function_call_item function_call_output_item", "openai", _AT_OPENAI, {"type": "direct"}),
    *_rows("output", "function_call_output_item", "openai vllm", holds="input_part"),
    *_rows("type", "input_text_part output_text_part refusal_part reasoning_text_part summary_text_part",
           "openai vllm"),
    *_rows("text", "input_text_part output_text_part reasoning_text_part summary_text_part", "openai vllm"),
    *_rows("refusal", "refusal_part", "openai vllm"),
    *_accepted("prompt_cache_breakpoint", "input_text_part", "openai",
               "advises OpenAI's prompt cache; here prompts that begin alike share it by themselves"),
    *_accepted("annotations logprobs", "output_text_part", "openai vllm", "tells of an earlier answer what no template"
               " asks"),
    # Webhooks
    *_rows("name url event_types", "webhook webhook_change", "openai"),
    *_rows("keep_old_secret_active_for_24_hours", "webhook_rotation", "openai"),
    *_rows("event_type", "webhook_test", "openai"),
    # Operators
    *_rows("name source token replace pin preload wait_s tenant", "register", _OWN),
    *_rows("lora_name lora_path", "load_lora", "vllm sglang"),
    *_rows("load_inplace", "load_lora", "vllm"),
    *_refused("is_3d_lora_weight", "load_lora", "vllm", "is found out from the adapter's tensors", False),
    *_refused("pinned", "load_lora", "sglang", "is not supported: POST /v1/adapters/NAME/pin pins", False),
    *_rows("lora_name", "unload_lora", "vllm sglang"),
    *_accepted("lora_int_id", "load_lora unload_lora", "vllm", "numbers an adapter within vLLM; here its name counts"),
)  # fmt: skip


def _by_object() -> dict[str, dict[str, Parameter]]:
    found: dict[str, dict[str, Parameter]] = {name: {} for name in OBJECTS}
    for parameter in PARAMETERS:
        for name in parameter.objects:
            found[name][parameter.name] = parameter
    return found


PARAMETERS_OF: Mapping[str, Mapping[str, Parameter]] = _by_object()
"""Object -> its parameters by name."""
