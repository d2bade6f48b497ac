"""*Constrain*, the fourth stage: the grammar that each prompt's answers must follow."""

from __future__ import annotations

from msgspec import structs

from gateway.bodies.parameter_check import ignore
from gateway.calls.tokenize import Prompt, TokenizedCall
from gateway.grammars.check import GrammarCheck
from gateway.grammars.notation import grammar_text
from gateway.text.answer_form import answer_grammar, marker_ids
from gateway.tools.definitions import Tools
from protocol.wire.errors import BadRequest


async def constrain(call: TokenizedCall, grammars: GrammarCheck) -> TokenizedCall:
    """Return a call whose prompts have their grammars. Raises BadRequest if one cannot be compiled."""
    options = call.options
    if options.constraint is None and options.tools is None and options.max_thought is None:
        return call
    prompts = [await _constrained(prompt, call, options.tools, grammars) for prompt in call.prompts]
    return structs.replace(call, prompts=prompts)


async def _constrained(prompt: Prompt, call: TokenizedCall, tools: Tools | None, grammars: GrammarCheck) -> Prompt:
    """Return a prompt with its grammar: of outlines of the tools where that of their schemas cannot be made."""
    try:
        grammar = await _grammar(prompt, call, tools, grammars)
    except BadRequest:
        outlined = tools.outlined() if tools is not None else None
        if outlined is None:
            raise
        grammar = await _grammar(prompt, call, outlined, grammars)
        ignore(call.parsed.caller.headers, [call.parsed.form_param])
    return structs.replace(prompt, grammar=grammar) if grammar else prompt


async def _grammar(prompt: Prompt, call: TokenizedCall, tools: Tools | None, grammars: GrammarCheck) -> str:
    """Return the grammar of a prompt's answers, "" if any will do. Raises BadRequest if it cannot be compiled."""
    options, marker = call.options, marker_ids(prompt.files)
    made = answer_grammar(options.constraint, tools, prompt.form, marker, options.max_thought)
    grammar = grammar_text(*made) if made else ""
    if grammar:
        await grammars.check(grammar, call.parsed.form_param, prompt.target.payer(call.parsed.caller))
    return grammar
