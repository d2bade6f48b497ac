"""LoRAX's own client: generate and generate_stream, an adapter by its id, its errors."""

from __future__ import annotations

from checks import Tour, differ, raises, same
from lorax import Client
from lorax.errors import GenerationError, ValidationError

PROMPT = "The capital of France is"


def main() -> None:
    """Use every kind of call once."""
    tour = Tour()
    client = Client(tour.url, headers={"Authorization": f"Bearer {tour.key}"}, timeout=120)
    adapter = {"adapter_id": tour.adapter, "adapter_source": "local"}
    with tour.check("base and adapter answer differently"):
        whole = client.generate(PROMPT, max_new_tokens=5)
        same(whole.details.generated_tokens, len(whole.details.tokens))
        other = client.generate(PROMPT, max_new_tokens=5, **adapter)
        # Without a chat template the words may be the same, but their probabilities never are.
        differ(*([(token.id, token.logprob) for token in said.details.tokens] for said in (whole, other)))
    with tour.check("a stream equals the whole answer"):
        for extra in ({}, adapter):
            whole = client.generate(PROMPT, max_new_tokens=5, **extra)
            streamed = list(client.generate_stream(PROMPT, max_new_tokens=5, **extra))
            same([event.token.id for event in streamed], [token.id for token in whole.details.tokens])
            same(streamed[-1].generated_text, whole.generated_text)
    with tour.check("best_of, alternatives of a token"):
        best = client.generate(PROMPT, best_of=2, do_sample=True, max_new_tokens=4, return_k_alternatives=2, **adapter)
        same(len(best.details.best_of_sequences), 1)
        same(len(best.details.tokens[0].alternative_tokens), 2)
    with tour.check("errors"):
        with raises(GenerationError, "nobody-has-this"):
            client.generate(PROMPT, adapter_id="nobody-has-this", adapter_source="local")
        with raises(ValidationError, "max_new_tokens"):
            client.generate(PROMPT, max_new_tokens=1 << 30)
    tour.end()


if __name__ == "__main__":
    main()
