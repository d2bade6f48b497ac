"""The parameters of OpenAI's Responses API: its part of the list in `parameters.py`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gateway.bodies.parameter_rows import LONG, NO_IMAGES, OWN, Parameter, accepted, refused, rows
from gateway.http.paths import CONVERSATIONS, INPUT_TOKENS, RESPONSES

_AT_OPENAI = "belongs to what runs at OpenAI: here the model and your own tools answer"

RESPONSE_OBJECTS: Mapping[str, str] = {
    "response": RESPONSES,
    "input_tokens": INPUT_TOKENS,
    "response_text": "text of /v1/responses",
    "response_format_text": "text.format of /v1/responses",
    "response_reasoning": "reasoning of /v1/responses",
    "response_conversation": "conversation of /v1/responses",
    "conversation": CONVERSATIONS,
    "conversation_change": f"{CONVERSATIONS}/ID",
    "new_items": f"{CONVERSATIONS}/ID/items",
    "response_tool": "an entry of tools of /v1/responses",
    "response_namespace": "a namespace in tools of /v1/responses",
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
}
"""Their part of `OBJECTS`."""

RESPONSE_TYPES: Mapping[str, Mapping[str | None, str]] = {
    "input_item": {
        None: "message_item",
        **{kind: f"{kind}_item" for kind in (
            "message", "reasoning", "function_call", "function_call_output", "item_reference",
        )},
    },
    "input_part": {kind: f"{kind}_part" for kind in (
        "input_text", "output_text", "refusal", "reasoning_text", "summary_text",
    )},
    "response_any_tool": {"function": "response_tool", "namespace": "response_namespace"},
    "response_function": {"function": "response_tool"},
}  # fmt: skip
"""Their part of `BY_TYPE`."""

_PROMPTS = "response input_tokens"

RESPONSE_PARAMETERS: Sequence[Parameter] = (
    *rows("model instructions", _PROMPTS, "openai vllm sglang"),
    *rows("input", _PROMPTS, "openai vllm sglang", holds="input_item"),
    *rows("tools", _PROMPTS, "openai vllm sglang", holds="response_any_tool"),
    *rows("tool_choice", _PROMPTS, "openai vllm sglang", holds="response_tool_choice"),
    *rows("parallel_tool_calls truncation previous_response_id", _PROMPTS, "openai vllm sglang"),
    *rows("temperature top_p stream max_output_tokens top_logprobs include service_tier metadata store background",
          "response", "openai vllm sglang"),
    *rows("conversation", _PROMPTS, "openai", holds="response_conversation"),
    *rows("id", "response_conversation", "openai"),
    *rows("items", "conversation new_items", "openai", holds="input_item"),
    *rows("metadata", "conversation conversation_change", "openai"),
    *rows("text", _PROMPTS, "openai vllm", holds="response_text"),
    *rows("reasoning", _PROMPTS, "openai vllm sglang", holds="response_reasoning"),
    *rows("chat_template_kwargs", _PROMPTS, "vllm"),
    *rows("seed", "response", "vllm"),
    *refused("personality", "input_tokens", "openai", "names a style of OpenAI's models: instructions say one"),
    *rows("top_k", "response", "vllm sglang"),
    *rows("lora_scale", "response", OWN),
    *accepted("user", "response", "openai vllm sglang",
               "names an end user to OpenAI's abuse detection, and never changes an answer"),
    *accepted("client_metadata", "response", "openai",
               "tells OpenAI about the program that asks, and never changes an answer"),
    *accepted("safety_identifier", "response", "openai",
               "is for OpenAI's abuse detection, and never changes an answer"),
    *accepted("prompt_cache_key prompt_cache_retention prompt_cache_options", "response", "openai vllm",
               "advises OpenAI's prompt cache; here prompts that begin alike share it by themselves"),
    *accepted("stream_options", "response", "openai",
               "pads the events of a stream against eavesdroppers, which no client reads"),
    *refused("prompt", "response", "openai vllm", "names a template that is kept at OpenAI, and nothing is here"),
    *refused("max_tool_calls", "response", "openai vllm sglang", _AT_OPENAI),
    *refused("moderation", "response", "openai", "asks for a filter of contents, and there is none"),
    *refused("context_management", "response", "openai", LONG, []),
    *refused("background_options access_programs", "response", "openai", "is about OpenAI's service"),
    *refused("image", "response", "openai", NO_IMAGES),
    *rows("stop min_p frequency_penalty presence_penalty repetition_penalty", "response", "sglang vllm"),
    *refused("priority", "response", "vllm sglang", "is not supported: service_tier flex is the lower class", 0),
    *refused("structured_outputs", "response", "vllm", "is served as text.format, and on /v1/chat/completions"),
    *refused("ignore_eos skip_special_tokens include_stop_str_in_output enable_response_messages", "response", "vllm",
              "is not supported", False),
    *refused("request_id", "response", "vllm", "is not supported: X-Request-Id is answered with"),
    *refused("cache_salt vllm_xargs mm_processor_kwargs previous_input_messages", "response", "vllm",
              "is not supported", {}),
    *rows("format", "response_text", "openai vllm", holds="response_format_text"),
    *accepted("verbosity", "response_text", "openai vllm",
               "is a trained ability of OpenAI's models, which no template has a variable for: say it in a message"),
    *rows("type schema strict", "response_format_text", "openai vllm"),
    *accepted("name description", "response_format_text", "openai vllm", "is for the reader of a request"),
    *rows("effort", "response_reasoning", "openai vllm sglang"),
    *refused("summary generate_summary", "response_reasoning", "openai vllm", "asks for a text about the reasoning: it"
              " is shown itself", "auto"),
    *refused("context", "response_reasoning", "openai", "is what the model's template makes of it", "auto"),
    *refused("mode", "response_reasoning", "openai", "may not choose: there is one mode", "standard"),
    *rows("type name description parameters strict", "response_tool", "openai vllm sglang"),
    *rows("type name description", "response_namespace", "openai"),
    *rows("tools", "response_namespace", "openai", holds="response_function"),
    *accepted("defer_loading", "response_tool", "openai",
               "keeps a function back until a search finds it: here the model is shown all of them"),
    *refused("async", "response_tool function_call_item", "openai", _AT_OPENAI, False),
    *refused("allowed_callers", "response_tool", "openai", _AT_OPENAI, ["direct"]),
    *refused("output_schema", "response_tool", "openai", "is not supported: templates show no form of results"),
    *rows("type name mode", "response_tool_choice", "openai vllm"),
    *rows("tools", "response_tool_choice", "openai vllm", holds="response_tool_choice"),
    *rows("type id", "message_item reasoning_item function_call_item function_call_output_item item_reference_item",
           "openai vllm"),
    *accepted("status", "message_item reasoning_item function_call_item function_call_output_item", "openai vllm",
               "tells how far an item was, which no template asks"),
    *rows("role", "message_item", "openai vllm"),
    *rows("content", "message_item reasoning_item", "openai vllm", holds="input_part"),
    *accepted("phase", "message_item", "openai", "is a mark that OpenAI's models are trained on"),
    *rows("summary", "reasoning_item", "openai vllm", holds="input_part"),
    *refused("encrypted_content", "reasoning_item", "openai vllm", "is encrypted, and OpenAI alone can read it"),
    *rows("call_id", "function_call_item function_call_output_item", "openai vllm"),
    *rows("name arguments", "function_call_item", "openai vllm"),
    *rows("namespace", "function_call_item", "openai vllm"),
    *accepted("name namespace", "function_call_output_item", "openai",
               "names the function that was called, which the call with this call_id does"),
    *refused("caller", "function_call_item function_call_output_item", "openai", _AT_OPENAI, {"type": "direct"}),
    *rows("output", "function_call_output_item", "openai vllm", holds="input_part"),
    *rows("type", "input_text_part output_text_part refusal_part reasoning_text_part summary_text_part",
           "openai vllm"),
    *rows("text", "input_text_part output_text_part reasoning_text_part summary_text_part", "openai vllm"),
    *rows("refusal", "refusal_part", "openai vllm"),
    *accepted("prompt_cache_breakpoint", "input_text_part", "openai",
               "advises OpenAI's prompt cache; here prompts that begin alike share it by themselves"),
    *accepted("annotations logprobs", "output_text_part", "openai vllm", "tells of an earlier answer what no template"
               " asks"),
)  # fmt: skip
"""Their rows."""
