"""TGI's clients: text-generation, and the Hub's `InferenceClient`, whose types come from TGI's specification."""

from __future__ import annotations

import asyncio

from checks import Tour, raises, same
from huggingface_hub import InferenceClient
from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError

PROMPT = "The capital of France is"


def main() -> None:
    """Use every kind of call once. text-generation cannot select an adapter."""
    tour = Tour()
    headers = {"Authorization": f"Bearer {tour.key}"}
    client = Client(tour.url, headers=headers, timeout=120)
    whole = client.generate(PROMPT, max_new_tokens=5, decoder_input_details=True)
    with tour.check("generate, with the prompt's tokens"):
        same(whole.details.generated_tokens, len(whole.details.tokens))
        assert whole.details.finish_reason == "length"
        prefill = whole.details.prefill
        assert prefill[0].logprob is None
        assert all(token.logprob <= 0 for token in prefill[1:])
        same("".join(token.text for token in prefill), PROMPT)
    with tour.check("a stream equals the whole answer"):
        streamed = list(client.generate_stream(PROMPT, max_new_tokens=5))
        same([event.token.id for event in streamed], [token.id for token in whole.details.tokens])
        same(streamed[-1].generated_text, whole.generated_text)
    with tour.check("best_of, stop_sequences"):
        best = client.generate(PROMPT, best_of=2, do_sample=True, max_new_tokens=4, watermark=True, top_k=50)
        same(len(best.details.best_of_sequences), 1)
        stopped = client.generate("1, 2, 3, 4,", max_new_tokens=20, stop_sequences=[","])
        assert stopped.details.finish_reason == "stop_sequence"
    with tour.check("async"):
        again = asyncio.run(AsyncClient(tour.url, headers=headers, timeout=120).generate(PROMPT, max_new_tokens=5))
        same(again.generated_text, whole.generated_text)
    with tour.check("InferenceClient: text_generation, whole and streamed"):
        texts = InferenceClient(model=tour.url, token=tour.key or None, timeout=120)
        same(texts.text_generation(PROMPT, max_new_tokens=5), whole.generated_text)
        events = list(texts.text_generation(PROMPT, max_new_tokens=5, details=True, stream=True))
        same([event.index for event in events], [1, 2, 3, 4, 5])
        same(events[-1].generated_text, whole.generated_text)
        assert events[-1].details.input_length > 0
    with tour.check("InferenceClient: chats of base and adapter differ, and a stream equals the whole answer"):
        chats = InferenceClient(base_url=f"{tour.url}/v1", api_key=tour.key or "none", timeout=120)
        asked = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8, "temperature": 0}
        said = [chats.chat.completions.create(model=name, **asked) for name in ("base", tour.adapter)]
        base, adapted = (answer.choices[0].message.content for answer in said)
        assert base != adapted
        chunks = chats.chat.completions.create(model=tour.adapter, stream=True, **asked)
        same("".join(chunk.choices[0].delta.content for chunk in chunks), adapted)
    with tour.check("errors"), raises(ValidationError, "max_new_tokens"):
        client.generate(PROMPT, max_new_tokens=1 << 30)
    tour.end()


if __name__ == "__main__":
    main()
