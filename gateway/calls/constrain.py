"""*Constrain*, the fourth stage: the grammar that each prompt's answers must follow."""

from __future__ import annotations

from msgspec import structs

from gateway.calls.tokenize import Prompt, TokenizedCall
from gateway.grammars.check import GrammarCheck
from gateway.grammars.notation import grammar_text
from gateway.text.answer_form import answer_grammar, marker_ids


async def constrain(call: TokenizedCall, grammars: GrammarCheck) -> TokenizedCall:
    """Return a call whose prompts have their grammars. Raises BadRequest if one cannot be compiled."""
    options = call.options
    if options.constraint is None and options.tools is None and options.max_thought is None:
        return call
    prompts: list[Prompt] = []
    for prompt in call.prompts:
        marker = marker_ids(prompt.files)
        made = answer_grammar(options.constraint, options.tools, prompt.form, marker, options.max_thought)
        if not made:
            prompts.append(prompt)
            continue
        grammar = grammar_text(*made)
        await grammars.check(grammar, call.parsed.form_param, prompt.target.payer(call.parsed.caller))
        prompts.append(structs.replace(prompt, grammar=grammar))
    return structs.replace(call, prompts=prompts)
