"""Which modules a LoRA config targets, by PEFT's own rules (`check_target_module_exists`, `get_pattern_key`, 0.21).

Patterns are untrusted input, so they run on RE2, whose time is linear in the text: with Python's `re` one config could
hold the GIL for hours. A pattern that the two engines might read differently is refused. Compiling one with RE2 takes
about a millisecond, so a map or list may have at most MAX_PATTERNS. Plain names, of which there may be many more, are
compared without RE2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import re2 as _re2  # pyright: ignore[reportMissingTypeStubs]

re2: Any = _re2  # re2 has no type stubs

MAX_PATTERN_CHARS = 16_384
MAX_PATTERNS = 256
"""Maximum regular expressions in one map or list."""
MIN_CONDENSED_TARGETS = 20
"""Number of targets from which PEFT condenses the list to shorter suffixes, before it reads `layers_to_transform`."""

_LITERAL = re.compile(r"[\w.-]+", re.ASCII)
_PART = re.compile(r"[\w-]+", re.ASCII)
_READ_DIFFERENTLY = re.compile(r"\[[:.=]|\{,")  # POSIX classes in RE2, a lower bound of 0 in Python


class BadPattern(ValueError):
    """A regular expression that PEFT or RE2 cannot compile, or that they might read differently."""


def compile_pattern(pattern: str) -> Any:
    """Return a pattern compiled by RE2. Raises BadPattern, whose text is a predicate such as "is too long"."""
    if len(pattern) > MAX_PATTERN_CHARS:
        raise BadPattern(f"is {len(pattern)} characters long; the limit is {MAX_PATTERN_CHARS}")
    if not pattern.isascii() or not pattern.isprintable() or _READ_DIFFERENTLY.search(pattern):
        raise BadPattern("uses a construct that is not served in patterns")
    options = re2.Options()
    options.log_errors = False
    try:
        compiled = re2.compile(pattern, options)
        re.compile(pattern)  # PEFT cannot use what Python's `re` cannot compile
    except (re2.error, re.error, OverflowError, RecursionError) as error:
        detail = error.args[0] if error.args else ""
        detail = detail.decode(errors="replace") if isinstance(detail, bytes) else str(detail)
        raise BadPattern(f"is not a pattern that can be served: {detail[:100]}") from None
    return compiled


@dataclass(frozen=True, slots=True)
class NameTargets:
    """Modules chosen by a list of names or endings of names, or by one pattern that must match the whole name."""

    endings: frozenset[str]
    pattern: Any = None

    @classmethod
    def read(cls, value: str | Sequence[str]) -> NameTargets:
        """Read a config's list or pattern. Raises BadPattern."""
        if isinstance(value, str):
            return cls(frozenset(), compile_pattern(value))
        return cls(frozenset(value))

    def chosen(self, module: str) -> bool:
        """Return whether a module is chosen."""
        if self.pattern is not None:
            return self.pattern.fullmatch(module) is not None
        if module.rpartition(".")[2] in self.endings:  # most lists have last parts of names
            return True
        return any(ending in self.endings for ending in endings_of(module))


def endings_of(module: str) -> Iterable[str]:
    """Yield `a.b.c`, `b.c`, `c`: the names by which a list may choose a module."""
    yield module
    at = module.find(".")
    while at >= 0:
        yield module[at + 1 :]
        at = module.find(".", at + 1)


@dataclass(frozen=True, slots=True)
class Layers:
    """The field `layers_to_transform`: modules chosen by an ending must be in one of these layers."""

    indices: frozenset[int]
    patterns: tuple[Any, ...]

    @classmethod
    def read(cls, indices: Sequence[int], layers_pattern: Sequence[str]) -> Layers:
        """Read the two config fields. Raises BadPattern."""
        if not layers_pattern:
            return cls(frozenset(indices), (compile_pattern(r".*?\.[^.]*\.(?P<idx>\d+)\."),))
        for pattern in layers_pattern:
            compile_pattern(pattern)  # on its own first, so that a stray bracket cannot pair with one of ours
        return cls(
            frozenset(indices), tuple(compile_pattern(rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\.") for p in layers_pattern)
        )

    def hold(self, module: str) -> bool:
        """Return whether a module is in one of the layers."""
        match = next((found for pattern in self.patterns if (found := pattern.match(module))), None)
        return match is not None and int(match.groupdict()["idx"]) in self.indices


@dataclass(frozen=True, slots=True)
class SavedModules:
    """The field `modules_to_save`: modules whose names end in these, and their submodules.

    PEFT does not adapt these.
    """

    endings: tuple[str, ...]
    plain: frozenset[str]  # names without a dot: single parts of module names
    patterns: tuple[Any, ...]  # the others

    @classmethod
    def read(cls, names: Sequence[str]) -> SavedModules:
        """Read the config's list. Raises BadPattern."""
        plain = frozenset(name for name in names if _PART.fullmatch(name))
        others = [name for name in dict.fromkeys(names) if name not in plain]
        _check_number(others)
        return cls(tuple(names), plain, tuple(compile_pattern(rf"(?:^|.*\.){name}(?:$|\..*)") for name in others))

    def saves(self, module: str) -> bool:
        """Return whether a module, or one that contains it, is saved."""
        while module and self.endings:
            if module.endswith(self.endings):
                return True
            module = module.rpartition(".")[0]
        return False

    def excludes(self, module: str) -> bool:
        """Return whether a module cannot be adapted because it, or one that contains it, is saved."""
        if self.plain and not self.plain.isdisjoint(module.split(".")):
            return True
        return bool(self.patterns) and any(pattern.match(module) is not None for pattern in self.patterns)


@dataclass(frozen=True, slots=True)
class Targets:
    """The fields of a config that choose the adapted modules."""

    targets: NameTargets
    excluded: NameTargets | None = None
    layers: Layers | None = None

    def chosen(self, module: str) -> bool:
        """Return whether PEFT would adapt a module, named as in `model.named_modules()`."""
        if self.excluded is not None and self.excluded.chosen(module):
            return False
        if not self.targets.chosen(module):
            return False
        return self.layers is None or module in self.targets.endings or self.layers.hold(module)


class PatternMap:
    """The field `rank_pattern` or `alpha_pattern`: numbers by pattern; the first matching pattern counts."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """values: numbers by pattern. Raises BadPattern, whose text begins with the pattern."""
        self.numbers = values
        self._patterns: list[tuple[str, str, Any]] = []  # (pattern, required ending of a name, compiled pattern)
        self._found: dict[str, str | None] = {}  # module -> first matching pattern
        _check_number([key for key in values if not _LITERAL.fullmatch(key)])
        for key in values:
            if _LITERAL.fullmatch(key):
                self._patterns.append((key, key.rpartition(".")[2], None))
                continue
            try:
                compile_pattern(key)
                self._patterns.append((key, "", compile_pattern(rf"(.*\.)?({key})$")))
            except BadPattern as error:
                raise BadPattern(f"{key[:100]!r} {error}") from None

    def get(self, module: str, default: Any) -> Any:
        """Return the number for a module, `default` if no pattern matches."""
        if not self._patterns:
            return default
        if module not in self._found:
            self._found[module] = self._first(module)
        key = self._found[module]
        return self.numbers.get(module, default) if key is None else self.numbers[key]

    def _first(self, module: str) -> str | None:
        """Return the first pattern that matches a module, None if none does."""
        for key, tail, compiled in self._patterns:
            if module.endswith(tail) and (
                _ends_with(module, key) if compiled is None else compiled.match(module) is not None
            ):
                return key
        return None


def _ends_with(module: str, key: str) -> bool:
    """Return whether a module's name equals a plain key or ends with a dot and it.

    A dot in the key matches anything.
    """
    at = len(module) - len(key)
    if at < 0 or (at > 0 and module[at - 1] != "."):
        return False
    return all(mine in (".", found) for mine, found in zip(key, module[at:], strict=True))


def _check_number(patterns: Sequence[str]) -> None:
    if len(patterns) > MAX_PATTERNS:
        raise BadPattern(f"is one of {len(patterns)} regular expressions; the limit is {MAX_PATTERNS}")
