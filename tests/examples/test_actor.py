"""The actor, a model for tours of agents, outputs the steps given in its prompt, one per call."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from examples.tours.actor import ASIDE, line_of

CALL = {"name": "read", "arguments": {"path": "a"}}
HEAD = "<|im_start|>system\n<tools>\n</tools><|im_end|>\n"
TURN = "<|im_start|>assistant\n"


def listed(*steps: Any) -> str:
    return (
        f"<|im_start|>user\nDo it.\n<steps>{base64.b64encode(json.dumps(steps).encode()).decode()}</steps><|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        (f"{HEAD}{listed(CALL, 'Done.')}{TURN}", f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"),
        (f"{HEAD}{listed(CALL, 'Done.')}{TURN}a call<|im_end|>\na result{TURN}", "Done."),
        (f"{HEAD}{listed(CALL, 'Done.')}{TURN}a call<|im_end|>\n{TURN}Done.<|im_end|>\n{TURN}", "Done."),
        (f"{HEAD}{listed(CALL, 'Done.')}{TURN}Done.<|im_end|>\n{listed('Again.')}{TURN}", "Again."),
        (f"{listed(CALL, 'Done.')}{TURN}", ASIDE),
        (f"{HEAD}{TURN}", ASIDE),
    ],
    ids=["first", "second", "the last one again", "a later list", "without tools", "without a list"],
)
def test_a_prompt_is_answered_by_the_step_that_it_has_come_to(prompt: str, line: str) -> None:
    assert line_of(prompt) == line
