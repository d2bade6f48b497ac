"""DSPy: a language model, signatures constrained to a schema by its JSON adapter, and errors."""

from __future__ import annotations

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # otherwise its import fetches prices from the network

import dspy
from checks import MAX_TOKENS, QUESTION, TEXTS, Tour, differ, raises, same
from dspy.lm15 import AccessPolicy, ModelSupport, OpenAIChatCompat, ProviderDefinition, register_provider


class Capital(dspy.Signature):
    """Answer a question about a city."""

    question: str = dspy.InputField()
    city: str = dspy.OutputField()
    is_capital: bool = dspy.OutputField()


def main() -> None:
    """Use every kind of call once."""
    tour = Tour()

    def model(name: str, max_tokens: int = MAX_TOKENS) -> dspy.LM:
        return dspy.LM(
            f"openai/{name}", api_base=tour.v1, api_key=tour.key, temperature=0, max_tokens=max_tokens,
            cache=False, num_retries=0,
        )  # fmt: skip

    with tour.check("base and adapter answer differently"):
        differ(said(model(tour.base)), said(model(tour.adapter)))
    with tour.check("usage adds up"):
        lm = model(tour.adapter)
        lm(QUESTION)
        usage = lm.history[-1]["usage"]
        same(usage["prompt_tokens"] + usage["completion_tokens"], usage["total_tokens"])
    with tour.check("a signature, whose schema the JSON adapter sends"):
        # DSPy sends a schema only to providers that are registered as supporting schemas.
        access = AccessPolicy(provider="fleet", env_keys=("KEY",), base_url=tour.v1)
        fleet = ProviderDefinition.chat(access, compat=OpenAIChatCompat.preset("vllm"))
        register_provider(fleet, supports=ModelSupport(response_schema=True))
        for name in (tour.base, tour.adapter):
            lm = dspy.LM(f"fleet/{name}", api_key=tour.key, temperature=0, max_tokens=200, cache=False)
            with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
                held = dspy.Predict(Capital)(question=QUESTION)
            assert isinstance(held.city, str)
            assert isinstance(held.is_capital, bool)
    if tour.embedder:
        with tour.check("embeddings of base and adapter"):
            there = {"api_base": f"{tour.embedder}/v1", "api_key": tour.key, "caching": False}
            made = [
                dspy.Embedder(f"openai/{name}", **there)(TEXTS).tolist() for name in (tour.base, tour.embedder_adapter)
            ]
            same([len(vectors) for vectors in made], [len(TEXTS)] * 2)
            differ(*made)
    with tour.check("errors"):
        with raises(Exception, "nobody-has-this"):
            model("nobody-has-this")(QUESTION)
        with raises(Exception, "max_tokens"):
            model(tour.base, 1 << 30)(QUESTION)
    tour.end()


def said(lm: dspy.LM) -> str:
    """Return the answer of `lm` to the question."""
    answer = lm(QUESTION)[0]
    return answer["text"] if isinstance(answer, dict) else answer


if __name__ == "__main__":
    main()
