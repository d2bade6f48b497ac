"""`lorafleet chat` chats with a model in the terminal: each line is a message, each answer is streamed."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

from lorafleet.shared.api import Api, add_flags, in_path, suggested
from lorafleet.shared.parser import Parser, suggestion
from protocol.runtime.adapter_refs import FOLDER
from protocol.wire.errors import BadRequest, LorafleetError, NotFound

COMMANDS = ("/reset", "/undo", "/model", "/quit", "/help")
HELP = "/reset starts a new chat, /undo removes the last question, /model NAME switches models, /quit exits"


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.epilog = f"Commands in the chat: {HELP}."
    parser.add_argument("model", metavar="MODEL", help="the base model or an adapter")
    parser.add_argument(
        "message",
        metavar="MESSAGE",
        nargs="*",
        default=[],
        help="ask this and exit (default: each line of the input is a message)",
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="maximum tokens per answer")
    parser.add_argument("--temperature", type=float, metavar="X", help="sampling temperature; 0: greedy")
    parser.add_argument("--seed", type=int, metavar="N", help="random seed of the sampling")
    parser.add_argument("--json", action="store_true", help="print each answer as a line of JSON")
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code: 1 if a question failed and input is not a terminal.

    Raises BadRequest, also if the input has no message, NotFound for an unknown model, and Unavailable.
    """
    is_prompt = sys.stdin.isatty() and not args.message
    if is_prompt:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives `input` a history and line editing
    failed, is_empty = False, True
    with Api(args) as api:
        check_model(api, args.model)
        chat = Chat(api, args)
        if args.message:
            chat.ask(" ".join(args.message))
            return 0
        if is_prompt:
            print(f"{args.model}: {HELP}", file=sys.stderr)
        for line in _lines():
            is_empty = is_empty and not line.strip()
            if line == "/quit":
                break
            try:
                chat.take(line)
            except KeyboardInterrupt:
                print("\n(stopped; the question was removed)", file=sys.stderr)
            except LorafleetError as error:
                failed = True
                print(f"error: {error.message}", file=sys.stderr)
    if not is_prompt and is_empty:
        raise BadRequest("no message: give one as an argument or on standard input")
    return int(failed and not is_prompt)


def check_model(api: Api, model: str) -> None:
    """Raise NotFound for a model that is not served, with the most similar name; Unavailable without a fleet.

    Names that requests may use without registration, such as a Hub repository, are left to the first question.
    """
    try:
        api.ask("GET", f"/v1/models/{in_path(model)}")
    except NotFound as error:
        if FOLDER.fullmatch(model):
            raise suggested(api, error, model) from None


class Chat:
    """A conversation and its printed output."""

    def __init__(self, api: Api, args: argparse.Namespace) -> None:
        """Begin with the system message, if one is given."""
        self._api = api
        self._model: str = args.model
        self._json: bool = args.json
        self._first = [{"role": "system", "content": args.system}] if args.system else []
        self.messages = list(self._first)
        given = {"max_tokens": args.max_tokens, "temperature": args.temperature, "seed": args.seed}
        self._options = {name: value for name, value in given.items() if value is not None}

    def take(self, line: str) -> None:
        """Run the command in a line, or ask it as a question. Raises as `ask`."""
        word, _, rest = line.partition(" ")
        if not line.strip():
            return
        if word == "/help":
            reply = HELP
        elif word == "/reset":
            self.messages = list(self._first)
            reply = "new chat"
        elif word == "/undo":
            reply = "removed the last question" if self.undo() else "there is no question to remove"
        elif word == "/model":
            if rest.strip():
                check_model(self._api, rest.strip())
                self._model = rest.strip()
            reply = f"chatting with {self._model}"
        elif word.startswith("/") and word[1:].isalpha():
            reply = f"unknown command {word}{suggestion(word, COMMANDS)}: {HELP}"
        else:
            self.ask(line)
            return
        print(reply, file=sys.stderr)

    def undo(self) -> bool:
        """Remove the last question, with its answer if it has one; return whether there was one."""
        while len(self.messages) > len(self._first):
            if self.messages.pop()["role"] == "user":
                return True
        return False

    def ask(self, text: str) -> None:
        """Ask a question and print the answer; a question without an answer is not kept in the conversation.

        Raises the fleet's error response, and Unavailable.
        """
        self.messages.append({"role": "user", "content": text})
        body = {
            "model": self._model,
            "messages": self.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._options,
        }
        answer, usage, finish = "", None, None
        try:
            for event in self._api.events("/v1/chat/completions", "POST", json=body):
                if "error" in event:
                    raise LorafleetError(event["error"]["message"])
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    finish = choice.get("finish_reason") or finish
                    answer += self._shown(choice["delta"])
        except BaseException:
            self.undo()
            raise
        self.messages.append({"role": "assistant", "content": answer})
        if self._json:
            print(json.dumps({"model": self._model, "content": answer, "finish_reason": finish, "usage": usage}))
        else:
            print("" if finish == "stop" else f" [{finish}]")
        sys.stdout.flush()

    def _shown(self, delta: dict[str, Any]) -> str:
        """Print the new text of an answer; return it without reasoning."""
        text, thought = delta.get("content") or "", delta.get("reasoning_content") or ""
        if not self._json:
            sys.stdout.write(f"\033[2m{thought}\033[0m" if thought and sys.stdout.isatty() else thought)
            sys.stdout.write(text)
            sys.stdout.flush()
        return text


def _lines() -> Iterator[str]:
    """Yield lines of the terminal or a pipe, until their end."""
    while True:
        try:
            yield input("> ") if sys.stdin.isatty() else input()
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except EOFError:
            return
