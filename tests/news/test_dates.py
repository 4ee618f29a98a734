"""Periods, durations and time stamps."""

from __future__ import annotations

from datetime import UTC, date, datetime

import pytest

from qengine.news import Period
from qengine.news.dates import ALWAYS, INDIA, parse_duration, read_stamp

NOW = datetime(2026, 5, 21, 12, 0, tzinfo=UTC)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=INDIA)


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("15m", 900), ("2h", 7200), ("1.5h", 5400), ("7d", 604800)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "s", "-5s", "0s", "5 s", "5y", "1e3s", "nans", "99999999d", "٣s "])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="duration must be a positive number and a unit"):
        parse_duration(text)


@pytest.mark.parametrize(("stamp", "belongs"), [
    ("2026-05-19T23:59:59", False),
    ("2026-05-20T00:00:00", True),
    ("2026-05-21T23:59:59", True),
    ("2026-05-22T00:00:00", False),
])
def test_days_are_indias_and_both_ends_are_included(stamp: str, belongs: bool) -> None:
    assert (at(stamp) in Period.parse_days("2026-05-20:2026-05-21")) is belongs


def test_what_has_no_date_belongs_to_every_period() -> None:
    assert None in Period.parse_days("2026-05-20:2026-05-20")
    assert None in Period.since(3600, NOW)


def test_since_has_no_end() -> None:
    period = Period.since(3600, NOW)
    assert NOW in period
    assert datetime(2026, 5, 21, 11, 0, tzinfo=UTC) in period
    assert datetime(2026, 5, 21, 10, 59, 59, tzinfo=UTC) not in period
    assert datetime(2030, 1, 1, tzinfo=UTC) in period


@pytest.mark.parametrize(("period", "operators"), [
    (ALWAYS, ""),
    (Period.since(24 * 3600, NOW), "when:24h"),
    (Period.since(60, NOW), "when:1h"),
    (Period.since(7 * 86400, NOW), "when:7d"),
    (Period.since(49 * 3600, NOW), "when:3d"),
    (Period.days(date(2026, 5, 20), date(2026, 5, 21)), "after:2026-05-19 before:2026-05-23"),
])
def test_operators_are_never_narrower_than_the_period(period: Period, operators: str) -> None:
    assert period.operators == operators


@pytest.mark.parametrize("text", ["", "2026-05-20", "20-05-2026:21-05-2026", "2026-05-20:2026-02-30", "a:b"])
def test_what_is_no_date_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="date range must be like"):
        Period.parse_days(text)


def test_a_range_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ends .* before it begins"):
        Period.parse_days("2026-05-21:2026-05-20")


@pytest.mark.parametrize("text", [
    "2026-05-20T18:30:00+00:00", "2026-05-20T18:30:00Z", "2026-05-20 18:30:00", "Wed, 20 May 2026 18:30:00 GMT",
    " Thu, 21 May 2026 00:00:00 +0530 ", "2026-05-21T00:00:00+05:30",
])
def test_stamps_of_all_sources_are_given_in_indias_offset(text: str) -> None:
    stamp = read_stamp(text)
    assert stamp is not None
    assert stamp.isoformat() == "2026-05-21T00:00:00+05:30"


@pytest.mark.parametrize("text", [None, 5, "", "yesterday", "2026-99-99", "0001-01-01T00:00:00+14:00"])
def test_what_is_no_stamp_is_none(text: object) -> None:
    assert read_stamp(text) is None
