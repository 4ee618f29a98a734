"""A run's policy in a file, as TOML or JSON; what is wrong in it is named, with the path."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from qengine import (
    BreakerPolicy,
    ExecutionPolicy,
    RateLimit,
    RetryPolicy,
    RunManifest,
    StopConditions,
    TaskError,
    TransientError,
    Window,
)

TEXT = """
name = "smoke"
inputs = [1, "two"]
concurrency = 4
batch_size = 20
batch_backoff = 1.5
budget = 100
[[limits]]
per_minute = 60
burst = 5
[[limits]]
limit = 30
seconds = 900
unit = "tokens"
[retry]
max_attempts = 3
retry_on = ["TransientError", "OSError"]
[breaker]
failures = 2
[stop]
max_failures = 10
"""

POLICY = ExecutionPolicy(
    concurrency=4,
    batch_size=20,
    batch_backoff=1.5,
    budget=100,
    limits=(RateLimit(per_minute=60, burst=5), Window(30, 900, "tokens")),
    retry=RetryPolicy(3, retry_on=(TransientError, OSError)),
    breaker=BreakerPolicy(2),
    stop=StopConditions(max_failures=10),
)


def test_toml_gives_the_policy_that_it_spells(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(TEXT, encoding="utf-8")
    assert RunManifest.load(path) == RunManifest(POLICY, "smoke", (1, "two"))


def test_json_gives_the_same_as_toml(tmp_path: Path) -> None:
    import tomllib

    path = tmp_path / "run.json"
    path.write_text(json.dumps(tomllib.loads(TEXT)), encoding="utf-8")
    assert RunManifest.load(str(path)) == RunManifest(POLICY, "smoke", (1, "two"))


def test_nothing_said_means_the_defaults() -> None:
    assert RunManifest.from_mapping({}) == RunManifest(ExecutionPolicy())


def test_the_mapping_given_is_left_as_it_is() -> None:
    data = {"name": "a", "inputs": [1], "retry": {"retry_on": ["ValueError"]}, "limits": [{"per_second": 1}]}
    before = json.dumps(data)
    assert RunManifest.from_mapping(data).policy.retry.retry_on == (ValueError,)
    assert json.dumps(data) == before


@pytest.mark.parametrize(("data", "said"), [
    ({"concurency": 4}, "a key of the manifest is 'concurency', allowed is name, inputs, concurrency, "),
    ({"retry": {"tries": 3}}, "a key of retry is 'tries'"),
    ({"limits": [{"per_second": 1, "brust": 2}]}, "a key of an item of limits is 'brust'"),
    ({"limits": [{"limit": 1, "seconds": 0}]}, "seconds is 0"),
    ({"limits": [{}]}, "exactly one of per_second"),
    ({"concurrency": 0}, "concurrency is 0"),
    ({"stop": {"max_failures": 0}}, "max_failures is 0"),
])
def test_what_is_not_allowed_is_named(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RunManifest.from_mapping(data)


@pytest.mark.parametrize(("data", "said"), [
    ([], "the manifest is"),
    ({"name": 3}, "name is 3"),
    ({"inputs": "abc"}, "inputs is 'abc'"),
    ({"limits": {"per_second": 1}}, "limits is"),
    ({"limits": [1]}, "an item of limits is 1"),
    ({"retry": 3}, "retry is 3"),
    ({"retry": {"retry_on": "OSError"}}, "retry_on is 'OSError'"),
    ({"retry": {"retry_on": ["NoSuchError"]}}, "an item of retry_on is 'NoSuchError'"),
    ({"retry": {"retry_on": ["print"]}}, "an item of retry_on is 'print'"),
    ({"retry": {"retry_on": [3]}}, "an item of retry_on is 3"),
    ({"breaker": []}, "breaker is"),
    ({"concurrency": "4"}, "concurrency is '4'"),
])
def test_what_is_of_the_wrong_kind_is_named(data: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        RunManifest.from_mapping(data)


def test_exceptions_are_named_as_qengine_or_python_names_them() -> None:
    data = {"retry": {"retry_on": ["TaskError", "KeyError"]}}
    assert RunManifest.from_mapping(data).policy.retry.retry_on == (TaskError, KeyError)


@pytest.mark.parametrize(("name", "content", "kind", "said"), [
    ("run.toml", b"name = ", ValueError, "Invalid value"),
    ("run.json", b"{", ValueError, "line 1"),
    ("run.json", b"[]", TypeError, "the manifest is"),
    ("run.yaml", b"", ValueError, r"allowed is a name that ends in \.toml or \.json"),
    ("run.toml", b"concurrency = 0", ValueError, "concurrency is 0"),
    ("run.json", b'{"name": "\xff"}', ValueError, "can't decode"),
])
def test_what_is_wrong_in_a_file_is_said_with_its_path(
    tmp_path: Path, name: str, content: bytes, kind: type[Exception], said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(kind, match=said) as caught:
        RunManifest.load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_is_not_there_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RunManifest.load(tmp_path / "run.toml")


@pytest.mark.parametrize("half", [{"limit": 30}, {"seconds": 900}])
def test_half_a_window_is_refused_as_what_it_is(half: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="both limit and seconds"):
        RunManifest.from_mapping({"limits": [half]})


def test_any_mapping_will_do_and_no_other_thing() -> None:
    assert RunManifest.from_mapping(MappingProxyType({"concurrency": 3})).policy.concurrency == 3
    with pytest.raises(TypeError, match="the manifest is 7"):
        RunManifest.from_mapping(7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="policy is 'x'"):
        RunManifest("x")  # type: ignore[arg-type]
