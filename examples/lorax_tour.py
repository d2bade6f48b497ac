"""A tour of LoRAX's own client, unchanged, against a running fleet: `make tour URL=http://127.0.0.1:8000 ADAPTER=name`.

It needs `lorax-client`, in a separate environment since that package requires older libraries.
"""

from __future__ import annotations

import sys

from lorax import Client
from lorax.errors import GenerationError, ValidationError


def main(url: str, adapter: str) -> None:
    """Use every kind of call once. Raises AssertionError when an answer is not as expected."""
    client = Client(url)
    whole = client.generate("The capital of France is", max_new_tokens=5)
    assert whole.details is not None
    assert whole.details.generated_tokens == len(whole.details.tokens) == 5
    assert whole.details.finish_reason == "length"
    streamed = list(client.generate_stream("The capital of France is", max_new_tokens=5))
    assert [event.token.id for event in streamed] == [token.id for token in whole.details.tokens]
    assert streamed[-1].generated_text == whole.generated_text
    print("generate, generate_stream:", repr(whole.generated_text))
    if adapter:
        best = client.generate(
            "Hello", adapter_id=adapter, adapter_source="local", best_of=2, do_sample=True, max_new_tokens=4,
            return_k_alternatives=2,
        )  # fmt: skip
        assert best.details is not None
        assert len(best.details.best_of_sequences or []) == 1
        assert len(best.details.tokens[0].alternative_tokens or []) == 2
        print("adapter", adapter, "best_of:", repr(best.generated_text))
    _expect(GenerationError, client, adapter_id="nobody-has-this", adapter_source="local")
    _expect(ValidationError, client, max_new_tokens=1 << 30)


def _expect(kind: type[Exception], client: Client, **parameters: object) -> None:
    try:
        client.generate("Hello", **parameters)  # type: ignore[arg-type]
    except kind as error:
        print(f"{kind.__name__}: {error}")
    else:
        raise AssertionError(f"{kind.__name__} was expected")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "")
