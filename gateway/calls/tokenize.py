"""*Render and tokenize*, the third stage: convert messages and texts to the token ids of prompts."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import msgspec
from msgspec import structs

from gateway.adapters.resolver import CallTarget
from gateway.bodies.parameter_check import ignore
from gateway.calls.parsed_call import CallOptions, ChatPrompt, Pairs, ParsedCall, Source, Texts
from gateway.calls.resolve import ResolvedCall
from gateway.chat.message_text import text_in
from gateway.overload import cost
from gateway.overload.memory import CHARACTER_BYTES
from gateway.text.answer_form import AnswerForm, found_form
from gateway.text.tokenizer import ModelFiles
from protocol.wire import messages as m
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest

Offset = tuple[int, int] | None
"""Position of a token in its text: characters [start, end); None for a special token, which is not in the text."""

Encoded = tuple[list[int], Sequence[Offset]]
"""A text's token ids, and their offsets if requested."""

MAX_BAD_WORD_TOKENS = 1024
"""Maximum tokens of all bad words together, as in vLLM. A step compares the latest tokens once per distinct length."""

ENCODED_BYTES = 150
"""Memory per token of a pair while pairs are tokenized: the library's encoding, and lists of ids."""

FEW_TOKENS = 1 << 14
"""Maximum ids, or characters of texts, of prompts that are built on the event loop: it takes a millisecond."""

LEAST_ROOM, MOST_ROOM = 8, 2
"""Messages are dropped until an eighth of the context is left for the answer, and up to half of it for `max_tokens`."""


class Prompt(msgspec.Struct, frozen=True):
    """One prompt of a call, for one target."""

    target: CallTarget
    ids: bytes  # int32; b"" for an earlier call, which needs none
    num_tokens: int
    max_new_tokens: int = 0  # per choice; 0 until admitted
    echo: str = ""  # the text that answers begin with
    grammar: str = ""  # grammar of the answers, as in `messages.Body`
    form: AnswerForm | None = None  # allowed parts of answers besides text
    offsets: Sequence[Offset] = ()  # offset of each token, if requested
    second: int = 0  # index of a pair's second text, as in `messages.Body`
    bad_words: list[list[int]] = []  # token sequences that answers may not contain

    @property
    def files(self) -> ModelFiles:
        """The target's tokenizer and templates."""
        return self.target.files


class TokenizedCall(msgspec.Struct, frozen=True):
    """A call with its prompts: for each target, all of them."""

    resolved: ResolvedCall
    prompts: list[Prompt]

    @property
    def parsed(self) -> ParsedCall:
        """The parsed call."""
        return self.resolved.parsed

    @property
    def options(self) -> CallOptions:
        """The call's parameters."""
        return self.resolved.parsed.options


def check_size(call: ResolvedCall, max_call_tokens: int) -> None:
    """Refuse prompts that have too many tokens in any case, before they are tokenized. Raises BadRequest.

    Ids are counted. A text has at least its length divided by the longest token's; this bound does not hold for a text
    of which only a part is kept.
    """
    inputs, rules, options = call.parsed.inputs, call.parsed.rules, call.parsed.options
    if isinstance(inputs, ChatPrompt):
        return  # `encode_chat` applies the limit to the rendered text
    num_tokens, limit = 0, None
    if isinstance(inputs, Pairs):  # `_check_pairs` applies the limit to shortened texts
        sources = [*inputs.firsts, *(inputs.seconds if inputs.most_second is None else ())]
    else:
        sources, limit = inputs.sources, most_left(inputs, options, call.base)
    longest = max(target.files.tokens.longest for target in call.targets)
    for source in sources:
        least = len(source) if isinstance(source, list) else len(source) // longest
        least = least if limit is None else min(least, limit)
        rules.most_tokens(options, least, call.base.max_model_len)
        num_tokens += least
    rules.check_total(num_tokens * len(call.targets) * options.n, max_call_tokens)


def most_left(inputs: ChatPrompt | Texts, options: CallOptions, base: m.ServedModel) -> int | None:
    """Return the maximum number of tokens kept of each prompt, None without truncation. Raises BadRequest."""
    if inputs.truncation is None:
        return None
    limit = inputs.truncation.limit(base.max_model_len, options.max_tokens)
    if limit > base.max_model_len:
        message = f"truncate_prompt_tokens is {limit}; this model's context has {base.max_model_len} tokens"
        raise BadRequest(message, param="truncate_prompt_tokens")
    return limit


async def tokenize(call: ResolvedCall) -> TokenizedCall:
    """Return the call with its prompts. Raises BadRequest for messages and ids that the model does not accept."""
    parsed = call.parsed
    prompts: list[Prompt] = []
    # Targets with equal tokenizer, vocabulary size and context length share prompts.
    same: dict[tuple[int, int, int], list[Prompt]] = {}
    for target in call.targets:
        vocab_size, base = target.vocab_size or call.base.vocab_size, target.within(call.base)
        shared = id(target.files), vocab_size, base.max_model_len
        if shared not in same:
            check_token_ids(parsed.options, vocab_size)
            if isinstance(parsed.inputs, ChatPrompt):
                same[shared] = [await _of_conversation(parsed, parsed.inputs, target, base)]
            elif isinstance(parsed.inputs, Pairs):
                same[shared] = await _of_pairs(parsed, parsed.inputs, target, vocab_size, base)
            else:
                same[shared] = await _of_texts(parsed, parsed.inputs, target, vocab_size, base)
            if parsed.options.bad_words:
                bad = await _bad_words(parsed.options.bad_words, target.files)
                same[shared] = [structs.replace(prompt, bad_words=bad) for prompt in same[shared]]
        prompts += [
            prompt if prompt.target is target else structs.replace(prompt, target=target) for prompt in same[shared]
        ]
    return TokenizedCall(call, prompts)


async def _of_conversation(call: ParsedCall, inputs: ChatPrompt, target: CallTarget, base: m.ServedModel) -> Prompt:
    """Return the prompt that the template renders from messages; if messages may be dropped, from as many as fit.

    System messages at the beginning are kept, and the rest begins with a user message. While messages can be dropped,
    the answer has room. A binary search over the starting points renders the template a logarithmic number of times.
    """
    if inputs.truncation is None or not inputs.truncation.drops_messages:
        return await _rendered(call, inputs, target, base)
    whole, messages = replace(inputs, truncation=None), inputs.messages
    first = next((i for i, one in enumerate(messages) if one["role"] not in ("system", "developer")), len(messages))
    starts = [first, *(i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user")]
    room = max(base.max_model_len // LEAST_ROOM, min(call.options.max_tokens or 0, base.max_model_len // MOST_ROOM))
    fitting: Prompt | None = None
    low, high = 0, len(starts)  # the first start that fits is in [low, high]
    while low < high or fitting is None:
        middle = 0 if high == len(starts) and not low else min((low + high) // 2, len(starts) - 1)
        shortened = replace(whole, messages=messages[:first] + messages[starts[middle] :])
        try:
            prompt = await _rendered(call, shortened, target, base)
            call.rules.most_tokens(call.options, prompt.num_tokens, base.max_model_len)
        except BadRequest as error:
            if error.code not in ("context_length_exceeded", "limit_exceeded") or middle == len(starts) - 1:
                raise
            low = middle + 1
        else:
            if base.max_model_len - prompt.num_tokens < room and middle < len(starts) - 1:
                low = middle + 1
            else:
                high, fitting = middle, prompt
    return fitting


async def _rendered(call: ParsedCall, inputs: ChatPrompt, target: CallTarget, base: m.ServedModel) -> Prompt:
    tools, files = call.options.tools, target.files
    limit = most_left(inputs, call.options, base)

    def check(text: str) -> None:
        least = len(text) // files.tokens.longest
        call.rules.most_tokens(call.options, least if limit is None else min(least, limit), base.max_model_len)

    encoded = await files.encode_chat(
        inputs.messages,
        add_generation_prompt=inputs.add_generation_prompt,
        continue_final=inputs.continue_final,
        variables=inputs.variables,
        tenant=target.payer(call.caller),
        tools=tools.definitions if tools is not None else None,
        add_special_tokens=inputs.add_special_tokens,
        check=check,
    )
    if not encoded.ids:
        raise BadRequest("the chat template renders these messages as an empty prompt", param=call.rules.param)
    form = await found_form(files, tools, opened=encoded.opened, continued=encoded.continued)
    ignore(call.caller.headers, call.rules.check_form(form))
    if encoded.continued and form is not None and form.style is not None and not form.style.marker:
        message = "this model's tool calls are complete answers and cannot follow a continued message; leave out"
        raise BadRequest(f"{message} tools, or continue_final_message", param="continue_final_message")
    ids = encoded.ids if limit is None or inputs.truncation is None else inputs.truncation.cut(encoded.ids, limit)
    num_tokens = len(ids)

    def make() -> bytes:
        packed = pack(ids)
        encoded.ids.clear()  # freed in the thread: a long list takes a millisecond
        return packed

    packed = make() if num_tokens <= FEW_TOKENS else await asyncio.to_thread(make)
    return Prompt(target, packed, num_tokens, echo=echoed(call, "", files), form=form)


async def _of_texts(
    call: ParsedCall, inputs: Texts, target: CallTarget, vocab_size: int, base: m.ServedModel
) -> list[Prompt]:
    def check(num_tokens: int) -> None:
        call.rules.most_tokens(call.options, num_tokens, base.max_model_len)

    texts = [source for source in inputs.sources if isinstance(source, str)]
    check_offsets = check if inputs.with_offsets else None
    found = await encoded(target.files, texts, check_offsets, special=inputs.add_special_tokens)
    limit = most_left(inputs, call.options, base)

    def make() -> list[Prompt]:
        prompts = _prompts(call, inputs, target, vocab_size, found, limit)
        found.clear()  # as in `_rendered`
        return prompts

    # A thread keeps the event loop responsive; for few tokens it would cost more than it saves.
    num_tokens = sum(map(len, inputs.sources))
    return make() if num_tokens <= FEW_TOKENS else await asyncio.to_thread(make)


def _prompts(
    call: ParsedCall, inputs: Texts, target: CallTarget, vocab_size: int, found: Sequence[Encoded], limit: int | None
) -> list[Prompt]:
    rules, files, of_texts = call.rules, target.files, iter(found)
    prompts: list[Prompt] = []
    for source in inputs.sources:
        ids, offsets = next(of_texts) if isinstance(source, str) else (source, ())
        shown: Source = source
        if limit is not None and inputs.truncation is not None and len(ids) > limit:
            shown = ids = inputs.truncation.cut(ids, limit)
        if not ids:
            raise rules.empty_prompt()
        if not isinstance(source, str):
            check_ids(ids, vocab_size, rules.param)
        prompts.append(Prompt(target, pack(ids), len(ids), echo=echoed(call, shown, files), offsets=offsets))
    return prompts


async def _of_pairs(
    call: ParsedCall, inputs: Pairs, target: CallTarget, vocab_size: int, base: m.ServedModel
) -> list[Prompt]:
    files = target.files
    if inputs.most_second is not None:
        cut = await files.encoder.shortened(inputs.seconds, inputs.most_second)
        inputs = replace(inputs, seconds=cut)
    if inputs.apart:
        return await _of_texts(call, Texts(inputs.sources), target, vocab_size, base)
    if base.task == "generate" and not target.num_labels and files.template_of_pairs is None:
        message = f"{target.name} ranks with a prompt, but its chat template has no roles query and document"
        raise BadRequest(f"{message}, and the setting pair_template is empty", param="model")
    await _check_pairs(call, inputs, target, base)
    pairs = await files.encode_pairs(inputs.texts, tenant=target.payer(call.caller))
    return await asyncio.to_thread(
        lambda: [Prompt(target, pack(pair.ids), len(pair.ids), second=pair.second) for pair in pairs]
    )


async def _check_pairs(call: ParsedCall, inputs: Pairs, target: CallTarget, base: m.ServedModel) -> None:
    """Refuse pairs that are too long, each or in total, and charge for their memory, before they are tokenized.

    A first text is repeated in each of its pairs, so that these may be much longer than the body. Raises BadRequest,
    and as `cost.hold`.
    """
    texts = [*inputs.firsts, *inputs.seconds]
    ids = await target.files.encoder.encode(texts, add_special_tokens=False)
    sizes = [(len(one), len(text)) for one, text in zip(ids, texts, strict=True)]
    firsts, seconds = sizes[: len(inputs.firsts)], sizes[len(inputs.firsts) :]
    if len(firsts) == 1:
        firsts *= len(seconds)
    for (first, _), (second, _) in zip(firsts, seconds, strict=True):
        call.rules.most_tokens(call.options, first + second, base.max_model_len)
    num_tokens, num_characters = (sum(size[which] for size in firsts + seconds) for which in (0, 1))
    call.rules.check_total(num_tokens, inputs.most_tokens)
    cost.hold(cost.held() + ENCODED_BYTES * num_tokens + CHARACTER_BYTES * num_characters)


async def encoded(
    files: ModelFiles, texts: Sequence[str], check: Callable[[int], object] | None, *, special: bool
) -> list[Encoded]:
    """Return the token ids of each text and, with a `check`, their offsets. special: add special tokens.

    check: raises if given a number of tokens that is too large, before lists are made of them.
    """
    if not texts:
        return []
    encoder = files.encoder
    if check is None:
        return [(ids, ()) for ids in await encoder.encode(texts, add_special_tokens=special)]
    encodings = await encoder.detailed(texts, add_special_tokens=special, check=check)
    return [
        (e.ids, [None if special else (start, end) for (start, end), special in zip(e.offsets, e.special, strict=True)])
        for e in encodings
    ]


async def _bad_words(words: Sequence[str], files: ModelFiles) -> list[list[int]]:
    """Return words as token sequences: each without a leading space and, if its first token then differs, with one.

    That is vLLM's rule. Raises BadRequest for a word that has no tokens, and for too many tokens.
    """
    bare = [word.lstrip() for word in words]
    texts = [text for word in bare for text in (word, f" {word}")]
    ids = await files.encoder.encode(texts, add_special_tokens=False)
    found: list[list[int]] = []
    for word, first, spaced in zip(words, ids[::2], ids[1::2], strict=True):
        if not first:
            raise BadRequest(f"bad_words: {word!r} has no tokens", param="bad_words")
        found.append(first)
        if spaced and spaced[0] != first[0] and len(spaced) == len(first):
            found.append(spaced)
    num = sum(map(len, found))
    if num > MAX_BAD_WORD_TOKENS:
        message = f"bad_words has {num} tokens (each word counts with and without a leading space)"
        raise BadRequest(f"{message}; the limit is {MAX_BAD_WORD_TOKENS}", param="bad_words")
    return found


def check_token_ids(options: CallOptions, vocab_size: int) -> None:
    """Refuse parameters with token ids outside the vocabulary. Raises BadRequest."""
    sampling = options.sampling
    for param, ids in (
        ("logit_bias", sampling.logit_bias),
        ("stop_token_ids", options.stop_token_ids),
        ("allowed_token_ids", sampling.allowed_token_ids),
        ("logprob_token_ids", sampling.logprob_token_ids),
    ):
        check_ids(ids, vocab_size, param)


def check_ids(ids: Collection[int], vocab_size: int, param: str) -> None:
    """Refuse token ids outside a vocabulary of `vocab_size` tokens. Raises BadRequest naming the first."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = brief(next(id_ for id_ in ids if not 0 <= id_ < vocab_size))
        text = f"{param}: token id {wrong} is out of vocabulary, whose {vocab_size} tokens count from 0"
        raise BadRequest(text, param=param)


def echoed(call: ParsedCall, source: Source, files: ModelFiles) -> str:
    """Return the text that answers begin with, "" if none: the prompt as sent, special tokens included.

    In a chat it is the last message's, if its role is the answer's.
    """
    inputs = call.inputs
    if not (inputs.echoes if isinstance(inputs, ChatPrompt) else call.options.echo):
        return ""
    if isinstance(inputs, Pairs):
        return ""
    if isinstance(inputs, Texts):
        return source if isinstance(source, str) else files.tokens.decode(source, special=True)
    last = inputs.messages[-1]
    is_answer = last["role"] == "assistant" or not inputs.add_generation_prompt
    return text_in(last) if is_answer else ""


def pack(ids: Sequence[int]) -> bytes:
    """Return token ids as packed int32."""
    return array("i", ids).tobytes()
