"""What is run, in words that are the same in every process as long as that is, so that a journal notices a change; and
what of it lives on beyond its runs, by names that are the same too, so that a journal finds it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, Final

from .policy import LiveLimit, LiveQuota, RateLimit, Window, check_quota
from .quota import Quota

Said = dict[str, dict[str, str]]
"""Of each thing that is run what is declared of it, by name, in words."""

_OF_A_SOURCE: Final = (
    "limits", "concurrency", "budget", "quota", "breaker", "retry", "timeout", "cost", "max_abandoned",
)


class Facts:
    """What is run.

    >>> from qengine import RateLimit, Source
    >>> facts = Facts()
    >>> facts.add("maps", Source("maps", len, [RateLimit(per_second=2)], budget=3))
    >>> facts.said["maps"]["budget"], facts.said["maps"]["limits"]
    ('3', '[RateLimit(per_second=2)]')
    >>> other = Facts()
    >>> other.add("maps", Source("maps", len, budget=4))
    >>> list(other.changes_since(facts.said))
    ['the limits of maps were [RateLimit(per_second=2)], and are [] now', 'the budget of maps was 3, and is 4 now']
    """

    def __init__(self) -> None:
        self.said: Said = {}
        self.limits: dict[Any, tuple[list[str], Any]] = {}
        """Live limits by what state they are: a name for each that has them, and how the engine takes from them."""
        self.quotas: dict[Any, list[str]] = {}
        """Quotas as the engine takes from them, with their names."""

    def say(self, name: str, what: str, words: str) -> None:
        """Say something of a thing that is run; of the run itself, where it has no name."""
        self.said.setdefault(name, {})[what] = words

    def add(self, name: str, thing: Any) -> None:
        """Say what is declared of a policy, or of a source."""
        for what in [of.name for of in fields(thing)] if is_dataclass(thing) else _OF_A_SOURCE:
            self.say(name, what, _in_words(getattr(thing, what)))
        for number, limit in enumerate(thing.limits):
            if not isinstance(limit, (RateLimit, Window)) and getattr(limit, "stored_line", None) is None:
                limits = limit.as_limit_set()
                names, _ = self.limits.setdefault(limits.key, ([], limits))
                names.append(f"{name}/limits/{number}")
        for number, quota in enumerate(check_quota("quota", thing.quota)):
            self.quotas.setdefault(quota.as_account(), []).append(f"{name}/quota/{number}")

    def changes_since(self, before: Said) -> Iterator[str]:
        """Say, sentence by sentence, what is not as it was."""
        for name in [*self.said, *(name for name in before if name not in self.said)]:
            old, new = before.get(name), self.said.get(name)
            if old is None or new is None:
                yield f"{name} is {'new' if old is None else 'gone'}"
                continue
            for what, words in new.items():
                if old.get(what) != words:
                    was, now = ("were", "are") if what == "limits" else ("was", "is")
                    of = f" of {name}" if name else ""
                    yield f"the {what}{of} {was} {old.get(what)}, and {now} {words} now"


def name_of(fn: Any) -> str:
    """Return what a function or an object is called."""
    while isinstance(fn, partial):
        fn = fn.func
    return str(getattr(fn, "__qualname__", None) or getattr(fn, "__name__", type(fn).__qualname__))


def _in_words(value: Any) -> str:
    """Return a declared value in words; of what lives on and changes only what was declared."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_in_words(of)}" for key, of in sorted(value.items())) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(_in_words, value)) + "]"
    if isinstance(value, Quota):
        return f"Quota({value.limit:.12g} {value.unit} {value.per})"
    if is_dataclass(value) and not isinstance(value, type):
        declared = [(of.name, getattr(value, of.name), of.default) for of in fields(value)]
        described = ", ".join(f"{name}={_in_words(own)}" for name, own, default in declared if own != default)
        return f"{type(value).__name__}({described})"
    if isinstance(value, (LiveLimit, LiveQuota)):
        return type(value).__name__
    return name_of(value)
