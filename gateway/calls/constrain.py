"""*Constrain*, the fourth stage: build the grammar that each prompt's answers must follow."""

from __future__ import annotations

from functools import partial

import orjson
from msgspec import structs

from gateway.bodies.parameter_check import ignore
from gateway.calls.parsed_call import CallOptions
from gateway.calls.tokenize import Prompt, TokenizedCall
from gateway.grammars.check import GrammarCheck
from gateway.grammars.notation import grammar_text
from gateway.overload.large import Checks
from gateway.text.answer_form import answer_grammar, marker_ids
from gateway.tools.definitions import Tools
from protocol.wire.errors import BadRequest


async def constrain(call: TokenizedCall, grammars: GrammarCheck, checks: Checks) -> TokenizedCall:
    """Return the call with a grammar for each prompt. Raises BadRequest if a grammar does not compile.

    Prompts with the same tokenizer and answer form share one grammar: with tools it may take a megabyte, and a call may
    name a model once per choice.
    """
    options = call.options
    if options.constraint is None and options.tools is None and options.max_thought is None:
        return call
    made: dict[tuple[int, int], str] = {}  # grammars by model files and form
    for prompt in call.prompts:
        key = id(prompt.files), id(prompt.form)
        if key not in made:
            made[key] = await _grammar_of(prompt, call, options.tools, grammars, checks)
    prompts = [structs.replace(prompt, grammar=made[id(prompt.files), id(prompt.form)]) for prompt in call.prompts]
    return structs.replace(call, prompts=prompts)


async def _grammar_of(
    prompt: Prompt, call: TokenizedCall, tools: Tools | None, grammars: GrammarCheck, checks: Checks
) -> str:
    """Return a prompt's grammar; if the tools' schemas do not compile, one of their outlines."""
    try:
        return await _checked(prompt, call, tools, grammars, checks)
    except BadRequest:
        outlined = tools.outlined() if tools is not None else None
        if outlined is None:
            raise
        grammar = await _checked(prompt, call, outlined, grammars, checks)
        ignore(call.parsed.caller.headers, [call.parsed.form_param])
        return grammar


async def _checked(
    prompt: Prompt, call: TokenizedCall, tools: Tools | None, grammars: GrammarCheck, checks: Checks
) -> str:
    """Return the grammar of a prompt's answers, "" if unconstrained. Raises BadRequest if it does not compile."""
    options, caller = call.options, call.parsed.caller
    num_bytes = tools.num_bytes if tools is not None else 0
    num_bytes += len(orjson.dumps(options.constraint)) if options.constraint is not None else 0
    grammar = await checks.do(partial(_grammar, options, tools, prompt), ("tools",), num_bytes, caller.owner)
    if grammar:
        await grammars.check(grammar, call.parsed.form_param, prompt.target.payer(caller))
    return grammar


def _grammar(options: CallOptions, tools: Tools | None, prompt: Prompt) -> str:
    """Return the grammar of a prompt's answers in its wire form, "" for none."""
    made = answer_grammar(options.constraint, tools, prompt.form, marker_ids(prompt.files), options.max_thought)
    return grammar_text(*made) if made else ""
