"""*Constrain*, the fourth stage: the grammar that each prompt's answers must follow."""

from __future__ import annotations

from functools import partial

import orjson
from msgspec import structs

from gateway.calls.parse import Options
from gateway.calls.tokenize import Prompt, TokenizedCall
from gateway.grammars.check import GrammarCheck
from gateway.grammars.notation import grammar_text
from gateway.overload.large import Checks
from gateway.text.answer_form import answer_grammar, marker_ids


async def constrain(call: TokenizedCall, grammars: GrammarCheck, checks: Checks) -> TokenizedCall:
    """Return a call whose prompts have their grammars. Raises BadRequest if one cannot be compiled."""
    options = call.options
    if options.constraint is None and options.tools is None and options.max_thought is None:
        return call
    prompts: list[Prompt] = []
    tenant = call.parsed.caller.owner
    num_bytes = options.tools.num_bytes if options.tools is not None else 0
    num_bytes += len(orjson.dumps(options.constraint)) if options.constraint is not None else 0
    for prompt in call.prompts:
        grammar = await checks.do(partial(_grammar, options, prompt), ("tools",), num_bytes, tenant)
        if not grammar:
            prompts.append(prompt)
            continue
        await grammars.check(grammar, call.parsed.form_param, prompt.target.payer(call.parsed.caller))
        prompts.append(structs.replace(prompt, grammar=grammar))
    return structs.replace(call, prompts=prompts)


def _grammar(options: Options, prompt: Prompt) -> str:
    """Return the grammar of a prompt's answers as it crosses the queue, "" for none."""
    marker = marker_ids(prompt.files)
    made = answer_grammar(options.constraint, options.tools, prompt.form, marker, options.max_thought)
    return grammar_text(*made) if made else ""
