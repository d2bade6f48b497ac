"""A base with sixteen adapters, made once for several files."""

from __future__ import annotations

import pytest
from oracle.peft_oracle import Oracle, sixteen_loras, tiny_llama


@pytest.fixture(scope="session")
def tiny() -> Oracle:
    return Oracle(tiny_llama(), sixteen_loras(head=True), scale=0.3)
