"""The maximum gateway memory that a call may hold once submitted, estimated before it is submitted. Pure.

The estimate does not depend on the output, with one exception: text whose tokens are longer than `TEXT_BYTES` on
average is charged as it grows (`TextGrowth`).
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
"""Maximum bytes that the logprobs of a call may take in the logs of its requests."""

MAX_WHOLE_BYTES = 1 << 24
"""The same for logprobs of the whole vocabulary, whose JSON takes fifteen times as many bytes."""

CHOICE_BYTES = 4 << 10
"""A choice without its tokens: its request, finish and stop rule."""

DELTA_BYTES = 256
"""A pending delta without its logprobs."""

ID_BYTES = 5
"""A token id in a growing array."""

SHOWN_ID_BYTES = 48
"""A token id in the list of an answer that shows ids, and in its JSON."""

TEXT_BYTES = 4
"""A token's text where an answer's text is collected: roughly the average of English, Chinese and code."""

NUMBER_BYTES = 12
"""Bytes per number of an encoder's answer: received, stored, and written."""

OFFSET_BYTES = 136
"""A token's offsets in its text: a pair of two numbers."""

GROWTH_BYTES = 1 << 14
"""Bytes by which the charge of a growing answer is raised at a time."""

ENTRY_BYTES = 160
"""A `logit_bias` entry, an id of a list or a character of a bad word, here and in the body kept for resubmission."""

REGEX_BYTES, SEARCH_BYTES = 1 << 19, 48 << 10
"""The automaton of a call's `stop_regex` with its table of characters, and each choice's own search state."""

RECORDS = 3
"""Copies of the logprob records, as bytes: as received, for repairing the queue's log, and being written."""

WHOLE_TEXTS = 5
"""Copies of a text whose last events repeat it whole: the collected one, and one per event."""

WRITTEN_RECORDS = 50
"""Copies of logprob records in that case: JSON of ten times their bytes, as often as the text."""

WRITTEN_TOKENS, WRITTEN_BYTES = 64, 16
"""Tokens whose logprobs are written at a time, and the memory that this takes per byte of a record."""


WRITTEN_WHOLE_BYTES = 96
"""Memory per byte of a record with the whole vocabulary's logprobs, of which one token is written at a time."""


def longest(options: CallOptions, num_prompt_tokens: int, max_model_len: int) -> int:
    """Return the maximum output tokens of a choice."""
    wanted = options.default_tokens if options.max_tokens is None else options.max_tokens
    return max(min(wanted, max_model_len - num_prompt_tokens), 0)


def check_logprobs(options: CallOptions, prompts: Sequence[Prompt]) -> None:
    """Refuse a call whose choices may have too many logprobs in total. Raises BadRequest."""
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
    """Return the maximum bytes of the logprobs of a call's outputs and prompts in the logs."""
    record, prompt_record = options.record_bytes, options.prompt_record_bytes
    if not (record or prompt_record):
        return 0
    num_new, num_old = (sum(prompt.max_new_tokens for prompt in prompts), sum(prompt.num_tokens for prompt in prompts))
    return options.n * (num_new * record + num_old * prompt_record)


def first_event_bytes(options: CallOptions, prompts: Sequence[Prompt]) -> int:
    """Return the maximum bytes of a job's first events, which include the prompt's logprobs if it is echoed."""
    num_old = options.n * sum(prompt.num_tokens for prompt in prompts)
    return WRITTEN_BYTES * num_old * options.prompt_record_bytes if options.echo else 0


def numbers_of(task: m.Task, prompts: Sequence[Prompt], base: m.ServedModel | None) -> int:
    """Return how many numbers an encoder returns for a call's prompts. base: None while it is unknown."""
    if task == "classify":
        return 2 * sum(prompt.num_tokens for prompt in prompts)
    if task == "score":
        own = len(base.labels) if base is not None else 0
        return sum(prompt.target.num_labels or own for prompt in prompts)
    return len(prompts) * base.width if task == "embed" and base is not None else 0


def call_bytes(options: CallOptions, prompts: Sequence[Prompt], num_numbers: int = 0) -> int:
    """Return the maximum bytes of memory that a call holds once submitted.

    prompts: each with its maximum output tokens. num_numbers: count of numbers in an encoder's answer.
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
    """Return whether an answer's text is, or may be, held until its end; also as the start of a possible stop match."""
    is_held = options.by_token or options.output == "tokens" or options.tools is not None
    return not options.stream or is_held or bool(options.sampling.stop_regex)


def texts_held(options: CallOptions) -> int:
    """Return how many copies of an answer's text exist at its end."""
    return WHOLE_TEXTS if options.by_token else 1


class TextGrowth:
    """Charges for the text of a call's answers beyond the estimate in its initial charge."""

    def __init__(self, options: CallOptions, prompts: Sequence[Prompt]) -> None:
        self._room = 0
        if gathers_text(options):
            self._room = TEXT_BYTES * options.n * sum(prompt.max_new_tokens for prompt in prompts)
        self.is_gathered = gathers_text(options)
        self._times = texts_held(options)

    def add(self, text: str) -> None:
        """Count a piece of collected text, and raise the charge if needed. Raises as `cost.hold`."""
        if self.is_gathered and text:
            self._room -= len(text) if text.isascii() else CHARACTER_BYTES * len(text)
            if self._room < 0:
                more = -self._room + GROWTH_BYTES
                cost.hold(cost.held() + self._times * more)
                self._room += more
