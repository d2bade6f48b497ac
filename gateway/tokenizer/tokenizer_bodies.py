"""The HTTP bodies of the tokenizer's routes. `/tokenize` has three forms, distinguished by the field to tokenize."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from gateway.bodies.fields import Name, Objects
from gateway.bodies.parameter_check import JsonBody
from gateway.lorax.lorax_bodies import AdapterParameters
from protocol.wire.errors import BadRequest

Form = Literal["inputs", "prompt", "messages"]

_CHAT = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")
_VLLM = ("model", "return_token_strs")
_ADAPTER = tuple(AdapterParameters.model_fields)


class TokenizeRequest(AdapterParameters):
    """`POST /tokenize`: LoRAX's form has `inputs`, vLLM's have `prompt` or `messages`.

    Unlike LoRAX, this route accepts an adapter, which may have added tokens.
    """

    OBJECT = "tokenize"

    inputs: str | None = None
    prompt: str | None = None
    messages: Annotated[Objects, Field(min_length=1)] | None = None
    model: Name | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Objects | None = None

    def form(self) -> Form:
        """Return the body's form. Raises BadRequest for none, for several, and for fields of another form."""
        given: list[Form] = [name for name in ("inputs", "prompt", "messages") if getattr(self, name) is not None]
        if not given:
            raise BadRequest("inputs: it is missing, and so are prompt and messages", param="inputs")
        form, *others = given
        foreign = {"inputs": (*_VLLM, *_CHAT), "prompt": (*_ADAPTER, *_CHAT), "messages": _ADAPTER}[form]
        for name in (*others, *foreign):
            if getattr(self, name) is not None:
                raise BadRequest(
                    f"{name} has no effect with {form}: it belongs to another form of this route", param=name
                )
        return form


class DetokenizeRequest(JsonBody):
    """`POST /detokenize`."""

    OBJECT = "detokenize"

    tokens: Annotated[list[int], Field(fail_fast=True)]
    model: Name | None = None
