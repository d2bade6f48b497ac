"""A tour of text-generation-inference's own client, unchanged: `make tour-tgi URL=http://127.0.0.1:8000`.

It needs `text-generation`, in a separate environment.
"""

from __future__ import annotations

import asyncio
import sys

from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError

PROMPT = "The capital of France is"


def main(url: str) -> None:
    """Use every kind of call once. Raises AssertionError when an answer is not as expected."""
    client = Client(url)
    whole = client.generate(PROMPT, max_new_tokens=5, decoder_input_details=True)
    assert whole.details.generated_tokens == len(whole.details.tokens) == 5
    assert whole.details.finish_reason == "length"
    prefill = whole.details.prefill
    assert prefill[0].logprob is None
    assert all(token.logprob is not None and token.logprob <= 0 for token in prefill[1:])
    assert "".join(token.text for token in prefill) == PROMPT
    streamed = list(client.generate_stream(PROMPT, max_new_tokens=5))
    assert [event.token.id for event in streamed] == [token.id for token in whole.details.tokens]
    assert streamed[-1].generated_text == whole.generated_text
    print("generate, generate_stream, prefill:", repr(whole.generated_text))
    best = client.generate(PROMPT, best_of=2, do_sample=True, max_new_tokens=4, watermark=True, top_k=50)
    assert len(best.details.best_of_sequences or []) == 1
    stopped = client.generate("1, 2, 3, 4,", max_new_tokens=20, stop_sequences=[","])
    assert stopped.details.finish_reason == "stop_sequence"
    print("best_of, stop_sequences:", repr(best.generated_text), repr(stopped.generated_text))
    again = asyncio.run(AsyncClient(url).generate(PROMPT, max_new_tokens=5))
    assert again.generated_text == whole.generated_text
    try:
        client.generate(PROMPT, max_new_tokens=1 << 30)
    except ValidationError as error:
        print(f"ValidationError: {error}")
    else:
        raise AssertionError("ValidationError was expected")


if __name__ == "__main__":
    main(sys.argv[1])
