"""The command line: `python -m qengine collect`.

Rules:

- whatever is wrong with the command is said before anything starts, and exits with 2;
- what is wrong is said in one line, and where to read on in the next, without a page of usage before them;
- exit codes: 0 done; 1 the articles, the report or the journal could not be written any more; 2 bad usage, or a file
  that will not do; 3 done, but some source never answered; 4 stopped by --deadline; 130 after Ctrl-C and 143 after
  SIGTERM, with everything so far on disk;
- with --journal the same command goes on where it was cut short; nothing is thrown away without a word;
- --simulate asks nobody, needs no key and writes no articles; it exits as the run that it is about would;
- articles go to a file, everything else to stderr.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO, TypeVar

from ..errors import StorageError
from ..model import CancellationToken, CollectionReport
from ..source import Source
from .arguments import BAD_USAGE, Parser
from .articles import read_articles
from .collect import SIGNAL_EXIT_CODES, cancelled_by_signals, collect
from .dates import ALWAYS, INDIA, Period, parse_duration
from .demo import DEMO_FAULTS, DEMO_SPEED, demo_articles
from .forecast import Forecast, Latency
from .formats import Article
from .http import check_base_url, is_loopback, may_hold_secret
from .output import ArticleFile, check_report, check_writable, write_report
from .progress import Progress
from .queries import QueryGenerator
from .regions import StateUT, get_all_regions, get_region_by_name, get_region_by_slug
from .server import Archive, NewsServer
from .show import add_to as add_show
from .show import show
from .sources import SOURCES, SourceOptions, budget_by_day, create_scheduler
from .summary import Tally, render, silent_sources, summarize
from .terms import HEAT, Terms, load_terms

if TYPE_CHECKING:  # loaded with the first journal
    from .journal import CollectionJournal

__all__ = ["main"]

T = TypeVar("T")

BROKEN, SILENT_SOURCE, DEADLINE = 1, 3, 4

_ANY_KEY: Final = "loopback"  # what a server on loopback is shown where no key is set
_LATENCY: Final = Latency(0.4, 1.2)
_OF_A_JOURNAL: Final = ("journal", "fresh", "retry_failed")

_EPILOG: Final = """\
sources: google needs no key; newsdata and gnews take theirs from NEWSDATA_API_KEY and GNEWS_API_KEY.
durations: 30s, 15m, 2h, 7d.
exit codes: 0 done; 1 the articles or the report or the journal could not be written any more; 2 bad usage; 3 done, but
some source never answered; 4 stopped by --deadline; 130 after Ctrl-C, 143 after SIGTERM, with everything so far on
disk.
--simulate needs no key, for it asks nobody; it writes no articles, and exits as the run itself would. Without --replay
every state is assumed to be active.
with --journal the caps of newsdata and gnews, 200 and 100 calls, are those of a day of UTC, else of a run.

try it, without a key or the network:  python -m qengine collect --demo
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments; those of the process unless given.

    Returns:
        The exit code.
    """
    try:
        parser = _parser()
        arguments = parser.parse_args(argv)
        if arguments.command is None:
            parser.print_help(sys.stderr)
            return BAD_USAGE
        return show(arguments) if arguments.command == "show" else _collect(arguments)
    except SystemExit as exit:  # argparse has said what is wrong
        return int(exit.code or 0)
    except KeyboardInterrupt:
        return SIGNAL_EXIT_CODES["SIGINT"]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="qengine", description="Many calls against sources that limit you.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    command = commands.add_parser(
        "collect",
        help="collect news, state by state, then district by district",
        description="Collect news about a topic, state by state, then district by district, from three sources.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_what(command)
    _add_where_to(command)
    _add_from(command)
    _add_how(command)
    add_show(commands)
    return parser


def _add_what(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("what to collect")
    add = group.add_argument
    add("--states", type=_type(_states), metavar="SLUG,...", help="these states and union territories (default: all)")
    add("--sources", type=_type(_sources), metavar="NAME,...", help=f"of {', '.join(SOURCES)} (default: all)")
    add("--terms", type=_type(load_terms), metavar="FILE.toml", help="search terms instead of those for heat")
    when = group.add_mutually_exclusive_group()
    when.add_argument("--since", type=_type(parse_duration), metavar="DURATION", help="only that recent, like 24h")
    when.add_argument(
        "--date-range", type=_type(Period.parse_days), metavar="DAY:DAY", help="only these days in India, both included"
    )


def _add_where_to(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("where to").add_argument
    add(
        "--out", type=_type(_file), metavar="FILE",
        help="the articles, as JSON lines (default: articles.jsonl; --demo: a new file)",
    )
    add("--append", action="store_true", help="go on with --out if it exists")
    add("--report", type=_type(_file), metavar="FILE", help="what became of the run, as JSON")
    add("--quiet", action="store_true", help="no progress and no table")
    add(
        "--journal", type=_type(_file), metavar="FILE",
        help="where it is recorded what was answered: the same command goes on where it was cut short",
    )
    add("--fresh", action="store_true", help="start over: forget what --journal knows")
    add("--retry-failed", action="store_true", help="ask again what --journal knows to have failed")


def _add_from(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("from where")
    add = group.add_argument
    server = group.add_mutually_exclusive_group()
    server.add_argument("--demo", action="store_true", help="from a server of our own, with made-up stories")
    server.add_argument(
        "--replay", type=_type(_recorded), metavar="FILE.jsonl", help="from a server of our own, with recorded articles"
    )
    add("--base-url", type=_type(_base_url), action="append", default=[], metavar="NAME=URL", help="ask a source there")
    add("--speed", type=_type(_speed), metavar="N", help="limits and pauses N times faster; for loopback servers only")
    add(
        "--server-log", type=_type(_file), metavar="FILE",
        help="every request to the server of --replay or --demo, as JSON lines",
    )


def _add_how(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("how")
    add = group.add_argument
    way = group.add_mutually_exclusive_group()
    way.add_argument("--threads", action="store_true", help="by threads (the default)")
    way.add_argument("--asyncio", action="store_true", help="in an event loop")
    way.add_argument(
        "--simulate", action="store_true", help="only tell which calls there would be, and when, at the real rates"
    )
    add("--timeout", type=_type(parse_duration), default=30.0, metavar="DURATION", help="for a call (default: 30s)")
    add("--deadline", type=_type(parse_duration), metavar="DURATION", help="for the run; after that it stops")
    add(
        "--latency", type=_type(Latency.parse), metavar="A:B",
        help="seconds that a simulated call takes, from A to B, or one number (default: 0.4:1.2)",
    )
    add("--seed", type=_type(_seed), metavar="N", help="draws other latencies for --simulate (default: 0)")


def _type(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Have argparse show the message of a ValueError, which says more than its own."""

    def checked(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return checked


def _states(text: str) -> tuple[StateUT, ...]:
    return tuple(dict.fromkeys(get_region_by_slug(slug.lower()) for slug in _listed(text, "state")))


def _sources(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_source(name) for name in _listed(text, "source")))


def _file(text: str) -> str:
    if not text:
        raise ValueError("the name of a file is needed, not ''")
    return text


def _base_url(text: str) -> tuple[str, str]:
    name, equals, url = text.partition("=")
    if not equals or "/" in name:
        shown = "" if may_hold_secret(text) else f", not {text!r}"
        raise ValueError(f"base URL must be like google=http://127.0.0.1:8000/rss/search{shown}")
    return _source(name), check_base_url(url)


def _speed(text: str) -> float:
    speed = float(text) if text.replace(".", "", 1).isdecimal() else math.nan
    if not 0.0 < speed < math.inf:
        raise ValueError(f"speed must be a finite number > 0, not {text!r}")
    return speed


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"seed must be a whole number >= 0, not {text!r}")
    return int(text)


def _recorded(path: str) -> _Recording:
    articles = read_articles(path, lambda article: get_region_by_name(article["state"]))
    if not articles:
        raise ValueError(f"{path} holds no articles")
    return _Recording(Path(path), articles)


def _source(text: str) -> str:
    name = text.lower()
    if name not in SOURCES:
        nearest = difflib.get_close_matches(name, SOURCES, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown source {text!r}: did you mean {nearest!r}?")
    return name


def _listed(text: str, what: str) -> Iterable[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ValueError(f"a {what} is missing in {text!r}: names with commas between them are needed")
    return names


@dataclass(frozen=True, slots=True)
class _Recording:
    """A file of articles, read and found good."""

    path: Path
    articles: Sequence[Article]


class _Command:
    """What collecting and simulating share: whom to ask what about what, and how to say what became of it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.tally = Tally()
        self.regions: tuple[StateUT, ...] = arguments.states or get_all_regions()
        self.names: tuple[str, ...] = arguments.sources or tuple(SOURCES)
        self.terms: Terms = arguments.terms or HEAT
        self.recording: _Recording | None = arguments.replay
        self._check_terms()

    def plan(self, period: Period) -> QueryGenerator:
        """What to ask."""
        return QueryGenerator(self.terms, period)

    def period(self) -> Period:
        """When."""
        if self.arguments.since is not None:
            return Period.since(self.arguments.since, datetime.now(UTC))
        return self.arguments.date_range or ALWAYS

    def when(self) -> str:
        """When, in words that are the same for the same options."""
        if self.arguments.since is not None:
            return f"the last {self.arguments.since:g} s"
        days: Period | None = self.arguments.date_range
        return "any time" if days is None else f"{days.start} to {days.end}"

    def create(self, name: str, key: str | None, base_url: str | None = None, speed: float = 1.0) -> Source:
        """The source of that name."""
        options: SourceOptions = {
            "base_url": base_url,
            "timeout": self.arguments.timeout,
            "speed": speed,
            "on_failure": self.tally.failed,
        }
        return create_scheduler(name, key, **options)

    def check_files(self, *others: str | Path | None) -> None:
        """Refuse a report that cannot be written, or is one of the others, and any of these that is named twice."""
        replayed = None if self.recording is None else self.recording.path
        named = [self.arguments.report, replayed, *others]
        paths = [Path(path).resolve() for path in named if path is not None]
        if len(set(paths)) < len(paths):
            raise ValueError("--out, --report, --journal, --server-log and --replay must be different files")
        if self.arguments.report is not None:
            check_report(self.arguments.report)

    def conclude(
        self,
        report: CollectionReport[Any],
        out: Path | None,
        simulated: Mapping[str, Any] | None = None,
        *,
        is_broken: bool = False,
    ) -> int:
        """Show the table, write the report, return the exit code."""
        code = BROKEN if is_broken else _exit_code(report, self.tally)
        summary = summarize(report, self.tally, code, simulated)
        if not self.arguments.quiet:
            written = "" if out is None else f"\nwritten to       {out}"
            _say(f"{render(summary)}{written}", prefix="")
        if self.arguments.report is not None:
            write_report(self.arguments.report, summary)
        return code

    def _check_terms(self) -> None:
        needed = {language for region in self.regions for language in region.query_languages}
        if missing := sorted(needed - self.terms.languages):
            raise ValueError(f"the terms have none for {', '.join(missing)}, in which these states are asked")


class _Collect(_Command):
    """The command, its arguments checked one by one; `run` does what they say."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        if simulating := _given(arguments, "latency", "seed"):
            raise ValueError(f"{', '.join(simulating)} without --simulate: real calls take the time they take")
        if arguments.journal is None and (journalling := _given(arguments, *_OF_A_JOURNAL)):
            raise ValueError(f"{', '.join(journalling)} without --journal: there is nothing to go on with")
        self.token = CancellationToken()
        self.urls: Mapping[str, str] = dict(arguments.base_url)
        self.has_server: bool = arguments.demo or self.recording is not None
        self.keys = self._keys()
        self.speed = self._checked_speed()
        self.out = self._out_path()
        self._check_files()

    def run(self) -> int:
        """Collect; return the exit code."""
        with ExitStack() as stack:
            stack.enter_context(cancelled_by_signals(self.token))
            journal = self._open_journal(stack)
            goes_on = journal is not None and journal.is_begun and not self.arguments.fresh
            append = self.arguments.append or goes_on or (journal is not None and _is_empty(self.out))
            out = stack.enter_context(ArticleFile(self.out, append=append))
            period = self.period() if journal is None else self._begin(journal, out)
            server = self._start_server(stack, goes_on)
            sources = [self._create(name, server) for name in self.keys]
            progress = self._progress(sources, stack)
            report: CollectionReport[Any] | None = None
            try:
                report = collect(
                    sources,
                    self.plan(period),
                    self.regions,
                    out,
                    tally=self.tally,
                    under_asyncio=self.arguments.asyncio,
                    deadline=self.arguments.deadline,
                    cancel=self.token,
                    on_progress=None if progress is None else progress.result,
                    on_event=None if progress is None else progress.event,
                    journal=journal,
                )
                if journal is not None:
                    journal.end(report)
            except StorageError as error:
                report = report or getattr(error, "report", None)
                if report is None:
                    raise
                _say(f"error: {error}")
                return self.conclude(report, self.out, is_broken=True)
            return self.conclude(report, self.out)

    def _open_journal(self, stack: ExitStack) -> CollectionJournal | None:
        if self.arguments.journal is None:
            return None
        from .journal import CollectionJournal

        return stack.enter_context(
            CollectionJournal(self.arguments.journal, _say, retry_failed=self.arguments.retry_failed)
        )

    def _begin(self, journal: CollectionJournal, out: ArticleFile) -> Period:
        """Say how far the journal is, or start it over; return the period that it is about."""
        from .journal import Asked

        if self.arguments.fresh:
            journal.start_over()
        elif journal.is_begun:
            _say(f"going on with {journal.path}: {journal.progress}")
        states = tuple(region.slug for region in self.regions)
        asked = Asked(states, tuple(self.keys), self.terms, self.when(), self.period())
        period, before = journal.begin(asked, out.path, out.held)
        out.own_from(before)
        self.tally.answered = journal.answered
        return period

    def _keys(self) -> Mapping[str, str | None]:
        """The sources to be asked, with their keys; one whose key is missing is left out."""
        keys: dict[str, str | None] = {}
        for name in self.names:
            variable = SOURCES[name].key_variable
            key = variable and (os.environ.get(variable, "").strip() or (_ANY_KEY if self._is_local(name) else ""))
            if key == "":
                _say(f"{name} is left out: {variable} is not set")
            else:
                keys[name] = key
        if not keys:
            raise ValueError("no source is left to ask")
        return keys

    def _is_local(self, name: str) -> bool:
        return is_loopback(self.urls[name]) if name in self.urls else self.has_server

    def _checked_speed(self) -> float:
        speed: float | None = self.arguments.speed
        if speed is None:
            return DEMO_SPEED if self.arguments.demo else 1.0
        if remote := [name for name in self.keys if not self._is_local(name)]:
            raise ValueError(
                f"--speed is for servers on loopback, not for {', '.join(remote)}: use --replay, --demo or --base-url"
            )
        return speed

    def _out_path(self) -> Path:
        if self.arguments.out is not None:
            return Path(self.arguments.out)
        if not self.arguments.demo or self.arguments.append:
            return Path("articles.jsonl")
        return Path(tempfile.mkdtemp(prefix="qengine-demo-")) / "articles.jsonl"

    def _check_files(self) -> None:
        log = self.arguments.server_log
        if log is not None and not self.has_server:
            raise ValueError("--server-log is for the server of --replay or --demo")
        self.check_files(self.out, log, self.arguments.journal)
        if log is not None:
            check_writable(log)

    def _start_server(self, stack: ExitStack, goes_on: bool) -> NewsServer | None:
        if not self.has_server:
            return None
        articles: Iterable[Article] = (
            demo_articles(datetime.now(INDIA).date()) if self.recording is None else self.recording.articles
        )
        faults = DEMO_FAULTS if self.arguments.demo else {}
        log = self.arguments.server_log and stack.enter_context(_open_log(self.arguments.server_log, goes_on))
        return stack.enter_context(NewsServer(articles, speed=self.speed, log=log, faults=faults))

    def _create(self, name: str, server: NewsServer | None) -> Source:
        url = self.urls.get(name) or (server.url(name) if server is not None else None)
        source = self.create(name, self.keys[name], url, self.speed)
        return source if self.arguments.journal is None else budget_by_day(source)

    def _progress(self, sources: Sequence[Source], stack: ExitStack) -> Progress | None:
        if self.arguments.quiet:
            return None
        return stack.enter_context(Progress(self.tally, sources, _say, is_terminal=sys.stderr.isatty()))


class _Simulate(_Command):
    """The forecast of a command, without what has no meaning where nobody is asked."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        if refused := _given(arguments, "demo", "base_url", "speed", "server_log", "out", "append", *_OF_A_JOURNAL):
            raise ValueError(
                f"--simulate with {', '.join(refused)}: it asks nobody, goes by the real rates and writes no articles"
            )
        self.check_files()

    def run(self) -> int:
        """Simulate; return the exit code that the run would have."""
        latency: Latency = self.arguments.latency or _LATENCY
        seed: int = self.arguments.seed or 0
        recording = self.recording
        report = Forecast(latency, seed, None if recording is None else Archive(recording.articles)).run(
            [self.create(name, _ANY_KEY) for name in self.names],
            self.plan(self.period()),
            self.regions,
            tally=self.tally,
            deadline=self.arguments.deadline,
        )
        return self.conclude(report, None, {
            "latency": [latency.shortest, latency.longest],
            "seed": seed,
            "answers": None if recording is None else recording.path.name,
        })


def _given(arguments: argparse.Namespace, *names: str) -> list[str]:
    """Those of these options that the command has."""
    values = {name: getattr(arguments, name) for name in names}
    given = [name for name, value in values.items() if value is not None and value is not False and value != []]
    return [f"--{name.replace('_', '-')}" for name in given]


def _collect(arguments: argparse.Namespace) -> int:
    try:
        return (_Simulate if arguments.simulate else _Collect)(arguments).run()
    except (ValueError, StorageError) as error:
        _say(f"error: {error}")
        return BAD_USAGE
    except OSError as error:  # a full disk, a folder that went away
        _say(f"error: cannot go on: {error}")
        return BROKEN


def _exit_code(report: CollectionReport[Any], tally: Tally) -> int:
    reason = report.stop_reason
    if reason in SIGNAL_EXIT_CODES:
        return SIGNAL_EXIT_CODES[reason]
    if reason == "timeout":
        return DEADLINE
    return SILENT_SOURCE if silent_sources(report, tally) else 0


def _open_log(path: str, goes_on: bool) -> TextIO:
    return open(path, "a" if goes_on else "w", encoding="utf-8", errors="replace")


def _is_empty(path: Path) -> bool:
    """Whether there is a file with nothing in it: a collection that was cut short as it began has left it."""
    return path.is_file() and not path.stat().st_size


def _say(text: str, prefix: str = "qengine collect: ") -> None:
    with suppress(OSError):  # nobody reads it any more: no reason to stop collecting
        print(f"{prefix}{text}\n", end="", file=sys.stderr, flush=True)  # one write: other threads say something too
