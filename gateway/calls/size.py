"""What a call may come to hold in the gateway's memory from the queue on, known before it is submitted. Pure.

Nothing of it depends on what the model says, but for the length of its words: an answer whose tokens are longer than
`TEXT_BYTES` on average is charged for the rest as it grows (`TextGrowth`).
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway.calls.parsed_call import CallOptions
from gateway.calls.replies import max_pending
from gateway.calls.tokenize import Prompt
from gateway.overload import cost
from gateway.overload.memory import CALL_BYTES, CHARACTER_BYTES, LARGE_FACTOR
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest

MAX_LOGPROB_BYTES = 1 << 27
"""Most bytes that the logprobs of a call may take in the logs of its requests."""

MAX_WHOLE_BYTES = 1 << 24
"""The same of a call that asks for the whole vocabulary, whose answer takes fifteen times as many bytes as JSON."""

CHOICE_BYTES = 4 << 10
"""A choice without its tokens: its request, its end, its stop rule."""

DELTA_BYTES = 256
"""A delta that waits, without its logprobs."""

ID_BYTES = 5
"""A token's id, in an array that grows."""

SHOWN_ID_BYTES = 48
"""The same in the list of an answer that shows ids, and in its JSON."""

TEXT_BYTES = 4
"""A token's text, where an answer's text is gathered: about what English, Chinese and code have."""

NUMBER_BYTES = 12
"""Bytes per number of an encoder's answer: received, stored, and written."""

OFFSET_BYTES = 136
"""Where a token lies in its text: a pair of two numbers."""

GROWTH_BYTES = 1 << 14
"""What a growing answer is charged at a time."""

ENTRY_BYTES = 160
"""A `logit_bias` entry, an id of a list or a letter of a bad word, here and in the body that may be resubmitted."""

REGEX_BYTES, SEARCH_BYTES = 1 << 19, 48 << 10
"""The automaton of a call's `stop_regex` with the characters that it knows, and what each choice has of its own."""

RECORDS = 3
"""How often logprobs are held, as bytes: as they came, to tell them to the queue again, and to be written."""

WHOLE_TEXTS = 5
"""How often a text is held whose last events have it whole: as it is gathered, and in each of them."""

WRITTEN_RECORDS = 50
"""How often logprobs are held there: as JSON, which has ten times their bytes, and as often as the text."""

WRITTEN_TOKENS, WRITTEN_BYTES = 64, 16
"""Tokens whose logprobs are written at a time, and bytes that this takes for each of a record's."""


WRITTEN_WHOLE_BYTES = 96
"""The same where each token has those of the whole vocabulary, of which one token's are written at a time."""


def longest(options: CallOptions, num_prompt_tokens: int, max_model_len: int) -> int:
    """Return the most tokens of an answer."""
    wanted = options.default_tokens if options.max_tokens is None else options.max_tokens
    return max(min(wanted, max_model_len - num_prompt_tokens), 0)


def check_logprobs(options: CallOptions, prompts: Sequence[Prompt]) -> None:
    """Refuse a call whose choices may have too many logprobs together. Raises BadRequest."""
    num_bytes, vocabulary = logprob_bytes(options, prompts), options.sampling.vocabulary
    limit = MAX_WHOLE_BYTES if vocabulary else MAX_LOGPROB_BYTES
    if num_bytes > limit:
        num_old = sum(prompt.num_tokens for prompt in prompts) if options.prompt_record_bytes else 0
        num_tokens = options.n * (sum(prompt.max_new_tokens for prompt in prompts) + num_old)
        raise BadRequest(
            f"the logprobs of up to {num_tokens} tokens{f', each of {vocabulary},' if vocabulary else ''} take"
            f" {num_bytes} bytes; the limit of {'such ' if vocabulary else ''}a call is {limit}: ask for fewer tokens,"
            " choices or likely tokens",
            param="max_tokens",
            code="limit_exceeded",
        )


def logprob_bytes(options: CallOptions, prompts: Sequence[Prompt]) -> int:
    """Return the most bytes that the logprobs of a call's answers and prompts have in the logs."""
    record, prompt_record = options.record_bytes, options.prompt_record_bytes
    if not (record or prompt_record):
        return 0
    num_new, num_old = (sum(prompt.max_new_tokens for prompt in prompts), sum(prompt.num_tokens for prompt in prompts))
    return options.n * (num_new * record + num_old * prompt_record)


def first_event_bytes(options: CallOptions, prompts: Sequence[Prompt]) -> int:
    """Return the most bytes of a job's first events, each of which has the logprobs of its prompt, if it is echoed."""
    num_old = options.n * sum(prompt.num_tokens for prompt in prompts)
    return WRITTEN_BYTES * num_old * options.prompt_record_bytes if options.echo else 0


def numbers_of(task: m.Task, prompts: Sequence[Prompt], base: m.ServedModel | None) -> int:
    """Return how many numbers an encoder makes of a call's prompts. base: None while it is not known."""
    if task == "classify":
        return 2 * sum(prompt.num_tokens for prompt in prompts)
    if task == "score":
        own = len(base.labels) if base is not None else 0
        return sum(prompt.target.num_labels or own for prompt in prompts)
    return len(prompts) * base.width if task == "embed" and base is not None else 0


def call_bytes(options: CallOptions, prompts: Sequence[Prompt], num_numbers: int = 0) -> int:
    """Return the most bytes that a call holds from the queue on.

    prompts: with the most tokens of each answer. num_numbers: of an encoder's answer.
    """
    num_choices, record = options.n * len(prompts), max(options.record_bytes, options.prompt_record_bytes)
    num_new = options.n * sum(prompt.max_new_tokens for prompt in prompts)
    num_bytes = CALL_BYTES + num_choices * CHOICE_BYTES + NUMBER_BYTES * num_numbers
    written = WRITTEN_WHOLE_BYTES if options.sampling.vocabulary else WRITTEN_TOKENS * WRITTEN_BYTES
    num_bytes += max_pending(num_choices) * (DELTA_BYTES + record) + written * record
    num_bytes += num_new * (ID_BYTES + (texts_held(options) * TEXT_BYTES if gathers_text(options) else 0))
    num_bytes += (WRITTEN_RECORDS if options.by_token else RECORDS) * logprob_bytes(options, prompts)
    if options.shows_ids:
        num_bytes += SHOWN_ID_BYTES * (num_new + options.n * sum(prompt.num_tokens for prompt in prompts))
    for prompt in prompts:
        num_bytes += len(prompt.ids) + CHARACTER_BYTES * (len(prompt.grammar) + options.n * len(prompt.echo))
        num_bytes += OFFSET_BYTES * len(prompt.offsets)
    given = options.sampling
    num_entries = len(given.logit_bias) + len(given.allowed_token_ids) + len(given.logprob_token_ids)
    num_bytes += ENTRY_BYTES * (num_entries + len(options.stop_token_ids) + sum(map(len, options.bad_words)))
    num_bytes += CHARACTER_BYTES * sum(map(len, options.stop))
    if given.stop_regex:
        num_bytes += REGEX_BYTES + num_choices * SEARCH_BYTES
    if options.tools is not None:
        num_bytes += LARGE_FACTOR * options.tools.num_bytes
    return num_bytes


def gathers_text(options: CallOptions) -> bool:
    """Return whether an answer's text is held until its end, or may be, as the beginning of a match."""
    is_held = options.by_token or options.output == "tokens" or options.tools is not None
    return not options.stream or is_held or bool(options.sampling.stop_regex)


def texts_held(options: CallOptions) -> int:
    """Return how often an answer's text is held at its end."""
    return WHOLE_TEXTS if options.by_token else 1


class TextGrowth:
    """The text of a call's answers as far as it is longer than what the call was charged for it."""

    def __init__(self, options: CallOptions, prompts: Sequence[Prompt]) -> None:
        self._room = 0
        if gathers_text(options):
            self._room = TEXT_BYTES * options.n * sum(prompt.max_new_tokens for prompt in prompts)
        self.is_gathered = gathers_text(options)
        self._times = texts_held(options)

    def add(self, text: str) -> None:
        """Note a piece of text that is gathered. Raises as `cost.hold` when there is no room for it."""
        if self.is_gathered and text:
            self._room -= len(text) if text.isascii() else CHARACTER_BYTES * len(text)
            if self._room < 0:
                more = -self._room + GROWTH_BYTES
                cost.hold(cost.held() + self._times * more)
                self._room += more
