"""The programs of `make tour`: the packages of each, and the script that uses it as its users do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Program:
    """One program: its name, its script below this folder, and its packages, the first of which gives its version.

    packages: requirements for pip, or for npm if the script is JavaScript. shares: the environment also sees the
    repository's own packages, so that PyTorch is not installed again. arguments: of the script. fleets: those of
    `fleets.py` that it uses: `text` at URL, `embedding` at EMBEDDER_URL, `acting` at ACTOR_URL.
    """

    name: str
    script: str
    packages: tuple[str, ...]
    shares: bool = False
    arguments: tuple[str, ...] = ()
    fleets: tuple[str, ...] = ("text", "embedding")


NODE = "node@^22.22"  # the newest SDKs require 22, which npm offers as a package
PROGRAMS = (
    Program("openai", "sdks/openai_tour.py", ("openai>=3,<4",)),
    Program("openai2", "sdks/openai_tour.py", ("openai>=2,<3",)),
    Program("litellm", "sdks/litellm_tour.py", ("litellm>=1.110,<2",)),
    # pip does not find litellm-proxy, which the proxy of 1.110 requires.
    Program("litellm-proxy", "sdks/litellm_proxy_tour.py", ("litellm[proxy]>=1.100,<1.110",)),
    Program("langchain", "sdks/langchain_tour.py", ("langchain-openai>=1.7,<2",)),
    Program(
        "llama-index",
        "sdks/llama_index_tour.py",
        ("llama-index-llms-openai-like>=0.8,<0.9", "llama-index-embeddings-openai-like"),
    ),
    Program("dspy", "sdks/dspy_tour.py", ("dspy[numpy]>=3.4,<4",)),
    Program("openai-agents", "sdks/openai_agents_tour.py", ("openai-agents>=0.24,<0.25",)),
    Program("pydantic-ai", "sdks/pydantic_ai_tour.py", ("pydantic-ai-slim[openai]>=2.68,<3",)),
    Program("instructor", "sdks/instructor_tour.py", ("instructor>=1.17,<2",)),
    Program("smolagents", "sdks/smolagents_tour.py", ("smolagents[openai]>=1.26,<2",)),
    Program("llm", "sdks/llm_tour.py", ("llm>=0.36,<0.40",)),
    Program("ollama", "sdks/ollama_tour.py", ("ollama>=0.6,<1",)),
    Program("anthropic", "sdks/anthropic_tour.py", ("anthropic>=2.14,<3",)),
    Program("lorax", "sdks/lorax_tour.py", ("lorax-client==0.6.3",)),
    Program("tgi", "sdks/tgi_tour.py", ("text-generation==0.7.0", "huggingface_hub")),
    Program("openai-js", "js/openai.mjs", ("openai@^7", NODE)),
    Program("ai", "js/ai.mjs", ("ai@^7", "@ai-sdk/openai-compatible@^3", "@ai-sdk/openai@^4", "zod@^4", NODE)),
    Program("promptfoo", "js/promptfoo.mjs", ("promptfoo@^0.123", NODE)),
    Program("lm-eval", "tools/lm_eval_tour.py", ("lm_eval[api]==0.4.13",), shares=True),
    Program("guidellm", "tools/guidellm_tour.py", ("guidellm>=0.8,<0.9",), shares=True),
    Program("aiperf", "tools/aiperf_tour.py", ("aiperf>=0.13,<0.14",), shares=True),
    *(
        Program(name, "js/agents.mjs", (package, NODE), arguments=(name,), fleets=("acting",))
        for name, package in (
            ("claude-code", "@anthropic-ai/claude-code@^2.1"),
            ("codex", "@openai/codex@^0.171"),
            ("qwen-code", "@qwen-code/qwen-code@^0.24"),
            ("opencode", "opencode-ai@^1.18"),
        )
    ),
    Program(
        "inspect-ai",
        "sdks/inspect_ai_tour.py",
        ("inspect_ai>=0.3.285,<0.4", "openai", "anthropic"),
        fleets=("text", "acting"),
    ),
    Program(
        "open-webui", "tools/open_webui_tour.py", ("open-webui>=0.12,<0.13",), shares=True, fleets=("text", "acting")
    ),
)
