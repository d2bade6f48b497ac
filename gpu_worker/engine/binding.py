"""Turns a request into a runnable sequence: checks it, sets stop rules, resolves its adapter and grammar."""

from __future__ import annotations

import numpy as np

from gpu_worker.adapters.cache import AdapterCache
from gpu_worker.engine.pooled import head_of
from gpu_worker.model.model import BaseModel
from gpu_worker.planning.request import EngineRequest, room_error
from gpu_worker.planning.sequence import Sequence
from gpu_worker.planning.speculation import Drafter
from gpu_worker.planning.stop import StopRules
from gpu_worker.sampling.grammars import Grammars
from gpu_worker.sampling.logprobs import PromptLogprobs
from gpu_worker.tasks.pooling import TextPool
from protocol.wire.errors import BadRequest
from protocol.wire.messages import Task
from protocol.wire.tokens import TokenTable

_DOES: dict[Task, str] = {"generate": "generates text", "embed": "embeds texts", "score": "scores texts"}

NEVER = 1 << 40
"""A position past the end of every text."""


class RequestBinder:
    """Opens requests as sequences, and binds each to its adapter and grammar once these are loaded.

    An adapter may bring its own tokens and vocabulary, so that much of a request cannot be checked before it is loaded.
    Methods return the finish reason of a request whose output is already complete, else "": such a request comes from a
    worker that died between the last token and the terminal message.
    """

    def __init__(
        self,
        model: BaseModel,
        adapters: AdapterCache,
        grammars: Grammars,
        tokens: TokenTable | None,
        *,
        max_model_len: int,
        max_draft_tokens: int,
    ) -> None:
        """tokens: the base model's token table, None without a tokenizer.

        max_draft_tokens: maximum draft tokens per sequence and step; 0: none.
        """
        self._model = model
        self._adapters = adapters
        self._grammars = grammars
        self._tokens = tokens
        self._max_model_len = max_model_len
        self._max_draft_tokens = max_draft_tokens

    def open(self, request: EngineRequest) -> tuple[Sequence, str]:
        """Return a request's sequence and its finish reason, if any. Raises BadRequest for what no step can compute."""
        self._check_task(request)
        check_request(request, self._max_model_len)
        if not request.digest:
            check_ids(request, self._model.vocab_size)
        seq = Sequence(request, self._max_model_len)
        if request.task != "generate":
            if not request.digest:
                self._bind_pool(seq)
            # One script writes a result and the request's end, so that neither exists without the other.
            return seq, "stop" if request.output else ""
        num_top = request.sampling.prompt_logprobs
        if num_top is not None and not request.output:
            seq.prompt_logprobs = PromptLogprobs(request.prompt, num_top, request.sampling.vocabulary)
        if self._max_draft_tokens:
            seq.drafter = Drafter(self._max_draft_tokens)
        reads_text = any(request.stop) or bool(request.sampling.stop_regex)
        if request.digest and reads_text:  # the adapter may add tokens
            return seq, ""
        finish = self._apply_stop_rules(seq, self._tokens)
        if request.grammar and not request.digest and not finish:
            self._compile_grammar(seq, self._tokens)
        return seq, finish

    def bind(self, seq: Sequence) -> str:
        """Resolve a sequence's adapter, which must be in the pool, and its grammar; return its finish reason, if any.

        Sets `is_bound` unless the grammar is still being compiled. Raises BadRequest, Internal.
        """
        finish = self._bind_adapter(seq) if seq.request.digest else ""
        return finish or self._bind_grammar(seq)

    def _bind_adapter(self, seq: Sequence) -> str:
        request = seq.request
        extras = self._adapters.extras.get(request.digest)
        seq.vocab_size = extras.vocab_size if extras is not None else 0
        check_ids(request, seq.vocab_size or self._model.vocab_size)
        if extras is not None and (error := extras.scale_error(request.lora_scale)) is not None:
            raise error
        if extras is not None and extras.num_virtual and not seq.num_virtual:
            self._put_virtual(seq, extras.num_virtual)
        invocation = self._adapters.invocations.get(request.digest)
        if request.task != "generate":
            if invocation:
                raise BadRequest("adapters with alora_invocation_tokens generate text alone", param="model")
            self._bind_pool(seq)
            return ""
        if extras is not None and extras.head is not None:
            raise BadRequest(
                "this adapter is a classifier: it has a head for scores, and generates no text", param="model"
            )
        tokens = self._adapters.tokens.get(request.digest, self._tokens)
        if seq.stop_rules is None:
            finish = self._apply_stop_rules(seq, tokens)
            if finish:
                return finish
        if request.grammar and seq.pending_matcher is None:
            self._compile_grammar(seq, tokens)
        if invocation:
            seq.activates, seq.active_from = True, activation_start(request.prompt, invocation)
            seq.num_base = 0 if extras is not None and extras.reaches_all_rows else seq.active_from
        return ""

    def _put_virtual(self, seq: Sequence, num: int) -> None:
        """Put an adapter's virtual tokens before a sequence's prompt. Raises BadRequest if they do not fit."""
        if (error := room_error(seq.request, num, self._max_model_len)) is not None:
            raise error
        seq.begin_with(num, self._max_model_len)
        seq.stop_rules = None  # they were made for more output tokens
        if seq.prompt_logprobs is not None:
            seq.prompt_logprobs.num_before = num

    def _check_task(self, request: EngineRequest) -> None:
        """Raise BadRequest for a task that the model does not have."""
        names = self._model.tasks.names
        if request.task in names:
            return
        does = " and ".join(_DOES[task] for task in sorted(names))
        raise BadRequest(f"this worker's model {does}; it does not {request.task}", param="model")

    def _bind_pool(self, seq: Sequence) -> None:
        """Decide how a sequence's result is pooled, and where its text may end. Raises BadRequest if there is no head.

        As in transformers, a classifier reads the last token that is not the padding token.
        """
        tasks, request = self._model.tasks, seq.request
        assert tasks.pooling is not None
        if request.task == "embed":
            if seq.num_virtual and tasks.pooling.mode != "lasttoken":
                raise BadRequest(
                    f"this adapter has virtual tokens, and {tasks.pooling.mode} pooling is of the text's tokens alone",
                    param="model",
                )
            seq.pool = TextPool(tasks.pooling.mode)
            if tasks.pooling.mode == "cls":
                seq.end_at(1)  # each token sees only those before it
            return
        seq.pool = TextPool("lasttoken")
        if head_of(seq, tasks, self._adapters.extras) is None:
            if tasks.score_tokens is None:
                who = "neither this adapter nor its base" if request.digest else "this base model has no"
                has = "has a classification head" if request.digest else "classification head: use an adapter with one"
                raise BadRequest(f"{who} {has}", param="model")
            seq.is_scored_by_tokens = True
            return
        padding_id = getattr(self._model.config, "pad_token_id", None)
        if padding_id is not None and not seq.num_virtual:  # transformers does not recognize padding after embeddings
            seq.end_at(1 + int(np.flatnonzero(request.prompt != padding_id).max(initial=0)))

    def _bind_grammar(self, seq: Sequence) -> str:
        if seq.pending_matcher is not None:
            if not seq.pending_matcher.done():
                return ""
            seq.matcher = seq.pending_matcher.result()
            if seq.matcher.is_complete:
                return "stop"
        seq.is_bound = True
        return ""

    def _apply_stop_rules(self, seq: Sequence, tokens: TokenTable | None) -> str:
        """Set a sequence's stop rules and feed them the output so far; return the finish reason, if any."""
        rules = StopRules(seq.request, seq.max_tokens - seq.num_prompt, self._model.eos_ids, tokens)
        seq.stop_rules = rules
        finish = ""
        for token in seq.request.output:
            finish = finish or rules.add(token)
        return finish

    def _compile_grammar(self, seq: Sequence, tokens: TokenTable | None) -> None:
        """Start compiling a sequence's grammar in another thread."""
        request = seq.request
        seq.pending_matcher = self._grammars.make(request.grammar, tokens, request.output, request.stop_token_ids)


def check_request(request: EngineRequest, max_model_len: int) -> None:
    """Raise BadRequest for what no step can compute. max_model_len: maximum tokens of prompt and output."""
    num = len(request.prompt)
    if request.task != "generate":
        if num == 0:
            raise BadRequest("the text is empty", param="input")
        if num > max_model_len:
            raise BadRequest(
                f"the text has {num} tokens, this model takes at most {max_model_len}", code="context_length_exceeded"
            )
        return
    if num == 0:
        raise BadRequest("the prompt is empty", param="prompt")
    if num >= max_model_len:
        raise BadRequest(
            f"the prompt has {num} tokens, this model takes at most {max_model_len} with the output",
            code="context_length_exceeded",
        )
    if request.max_new_tokens < 1:
        raise BadRequest("max_new_tokens must be at least 1", param="max_tokens")


def check_ids(request: EngineRequest, vocab_size: int) -> None:
    """Raise BadRequest for token ids that the model or the adapter does not have."""
    if request.prompt.min() < 0 or request.prompt.max() >= vocab_size:
        raise BadRequest(f"the prompt holds token ids outside 0 … {vocab_size - 1}", param="prompt")
    s = request.sampling
    if not 0 <= s.vocabulary <= vocab_size:
        raise BadRequest(f"logprobs of {s.vocabulary} tokens are asked for; the model has {vocab_size}")
    words = [id_ for word in s.bad_words for id_ in word]
    for ids in (s.logit_bias, s.allowed_token_ids, s.logprob_token_ids, words, request.stop_token_ids):
        if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
            raise BadRequest(f"a parameter of the request holds token ids outside 0 … {vocab_size - 1}")


def activation_start(prompt: np.ndarray, invocation: tuple[int, ...]) -> int:
    """Return where an activated LoRA begins to apply: the start of the last `invocation` in the prompt, else `NEVER`.

    prompt: int32 [P]. Activated LoRA: Greenewald et al. 2025, arXiv 2504.12397.
    """
    wanted = np.array(invocation, prompt.dtype)
    if len(wanted) > len(prompt):
        return NEVER
    windows = np.lib.stride_tricks.sliding_window_view(prompt, len(wanted))
    found = np.flatnonzero((windows == wanted).all(-1))
    return int(found[-1]) if len(found) else NEVER
