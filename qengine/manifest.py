"""A run's policy in a file: `RunManifest`, from TOML or JSON.

The keys are those of `ExecutionPolicy` and of the values in it, so there is nothing to learn twice:

    name = "smoke tests"
    concurrency = 4
    batch_size = 20
    batch_backoff = 1.0
    [[limits]]
    per_minute = 60
    burst = 5
    [[limits]]
    limit = 30
    seconds = 900
    [retry]
    max_attempts = 3
    retry_on = ["TransientError", "OSError"]
    [stop]
    max_failures = 10

An unknown key is refused by name.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any, Self

from . import errors
from .errors import refuse, refuse_type, require_kind
from .policy import Adaptive, BreakerPolicy, ExecutionPolicy, Limit, RateLimit, RetryPolicy, StopConditions, Window


@dataclass(frozen=True, slots=True)
class RunManifest:
    """What a run is called, what goes in, and how it is run.

    >>> RunManifest.from_mapping({"concurrency": 2, "inputs": [1, 2, 3]}).policy.concurrency
    2
    """

    policy: ExecutionPolicy
    name: str = ""
    inputs: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        require_kind("policy", self.policy, ExecutionPolicy)
        require_kind("name", self.name, str)
        require_kind("inputs", self.inputs, tuple)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read a file whose name ends in .toml or .json.

        Raises:
            OSError: It cannot be read.
            ValueError, TypeError: It is not what the suffix says, or a key or value is not allowed; with the path.
        """
        name = str(path)
        with open(name, "rb") as file:
            content = file.read()
        try:
            return cls.from_mapping(_parse(name, content.decode("utf-8")))
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> Self:
        """Make one of a mapping as such a file holds it."""
        if not isinstance(data, Mapping):
            refuse_type("the manifest", data, "a mapping")
        rest = dict(data)
        name = rest.pop("name", "")
        inputs = require_kind("inputs", rest.pop("inputs", []), list)
        for key, kind in (("stop", StopConditions), ("breaker", BreakerPolicy)):
            if key in rest:
                rest[key] = _build(kind, key, rest[key])
        if isinstance(rest.get("concurrency"), dict):
            rest["concurrency"] = _build(Adaptive, "concurrency", rest["concurrency"])
        if "retry" in rest:
            rest["retry"] = _build(RetryPolicy, "retry", _with_classes(rest["retry"]))
        if "limits" in rest:
            rest["limits"] = tuple(_limit(item) for item in require_kind("limits", rest["limits"], list))
        policy: ExecutionPolicy = _build(ExecutionPolicy, "the manifest", rest, ("name", "inputs"))
        return cls(policy, name, tuple(inputs))


def _parse(name: str, text: str) -> Any:
    if name.endswith(".toml"):
        import tomllib

        return tomllib.loads(text)
    if name.endswith(".json"):
        import json

        return json.loads(text)
    return refuse("the manifest's path", name, "a name that ends in .toml or .json")


def _build(kind: type[Any], where: str, data: Any, others: tuple[str, ...] = ()) -> Any:
    require_kind(where, data, dict)
    allowed = [*others, *(field.name for field in fields(kind))]
    for key in data:
        if key not in allowed:
            refuse(f"a key of {where}", key, ", ".join(allowed))
    return kind(**data)


def _limit(item: Any) -> Limit:
    require_kind("an item of limits", item, dict)
    is_window = "seconds" in item or "limit" in item
    if is_window and not {"seconds", "limit"} <= item.keys():
        refuse("an item of limits", item, "a rate (per_second, ...), or a window with both limit and seconds")
    limit: Limit = _build(Window if is_window else RateLimit, "an item of limits", item)
    return limit


def _with_classes(retry: Any) -> Any:
    """Replace the names in `retry_on` by the exception classes, qengine's or built in."""
    if not isinstance(retry, dict) or "retry_on" not in retry:
        return retry
    kinds = []
    for name in require_kind("retry_on", retry["retry_on"], list):
        kind = getattr(errors, str(name), None) or getattr(builtins, str(name), None)
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            refuse_type("an item of retry_on", name, "the name of an exception of qengine's or of Python's")
        kinds.append(kind)
    return {**retry, "retry_on": tuple(kinds)}
