"""The formula of a gateway's memory matches the explanation in docs/threat-model.md."""

from __future__ import annotations

import re
from pathlib import Path

from hostile.memory import Crowd, gateway_bytes

from protocol.runtime.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "threat-model.md"


def test_the_page_has_the_formulas_values_at_the_defaults() -> None:
    settings = Settings()
    everybody = Crowd(10**6, settings.max_connections)
    tenant = Crowd(2, settings.max_connections_per_address)  # the tenant and its address
    section = PAGE.read_text().partition("### Memory of a gateway")[2].partition("###")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ")][2:]
    written = [[int(re.sub(r"\D", "", cell)) for cell in row[-2:]] for row in rows]
    of_all, of_one = (gateway_bytes(settings, crowd) for crowd in (everybody, tenant))
    computed = [[of_all[what] >> 20, of_one[what] >> 20] for what in of_one]
    total = [sum(of.values()) >> 20 for of in (of_all, of_one)]
    assert written[: len(computed) + 1] == [*computed, total]
    assert total[0] < 5632


def test_less_is_less() -> None:
    settings, crowd = Settings(), Crowd(2, 500)
    whole = sum(gateway_bytes(settings, crowd).values())
    for change in ({"max_connections": 10}, {"gateway_memory": 1 << 30}, {"max_body_bytes": 1 << 20}):
        assert sum(gateway_bytes(settings.model_copy(update=change), crowd).values()) < whole, change
