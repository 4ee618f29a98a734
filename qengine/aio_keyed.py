"""The rate limiter for each key, for asyncio: what `keyed.py` remembers, with tasks for threads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable

from .aio_limiter import AsyncRateLimiter, AsyncReservation
from .errors import optional, refuse, require_at_least
from .keyed import KeyedBase, KeyedRateLimiter, Keys, limiter_on
from .limiter import RateLimiter
from .line import Line
from .model import Amount
from .policy import RateLimit, Window


class AsyncKeyedRateLimiter(KeyedBase[AsyncRateLimiter]):
    """An `AsyncRateLimiter` for each key: `KeyedRateLimiter`, with await on `acquire` and a reservation's `wait`.

    Args:
        limits: One or more `RateLimit` and `Window`; for each key every one of them holds.  Or one `KeyedRateLimiter`:
            what it remembers is shared, and so is each key's line, in which threads and tasks wait together.
        now_fn: Gives seconds as float; `time.monotonic` as it is when the limiter is made.
        sleep_fn: An async function that sleeps so many seconds; see `AsyncRateLimiter`.
        initial: Tokens in each bucket of each key when this is made; None for full ones.

    Tasks of any number of event loops may share it.  Thread-safe.  Costs, and forgets, as `KeyedRateLimiter` does.

    >>> import asyncio
    >>> from qengine.testing import VirtualClock
    >>> clock = VirtualClock()
    >>> limiter = AsyncKeyedRateLimiter(RateLimit(per_second=4), now_fn=clock.now)
    >>> async def main() -> list[tuple[str, float]]:
    ...     return [(name, clock.now()) for name in ("ann", "bob", "ann") if await limiter.acquire(name)]
    >>> asyncio.run(main())
    [('ann', 0.0), ('bob', 0.0), ('ann', 0.25)]
    """

    def __init__(
        self,
        *limits: RateLimit | Window | KeyedRateLimiter,
        now_fn: Callable[[], float] | None = None,
        sleep_fn: Callable[[float], Awaitable[object]] | None = None,
        initial: float | None = None,
    ) -> None:
        own = [limit for limit in limits if not isinstance(limit, KeyedRateLimiter)]
        shared = next((limit for limit in limits if isinstance(limit, KeyedRateLimiter)), None)
        if shared is None:
            plain = RateLimiter(*own, now_fn=now_fn, initial=initial)
            keys = Keys(own, plain._now_fn, initial)
        else:
            if len(limits) > 1:
                refuse("limits", limits, "one KeyedRateLimiter alone, or one or more RateLimit and Window")
            for name, value in (("now_fn", now_fn), ("initial", initial)):
                if value is not None:
                    refuse(name, value, "None beside a KeyedRateLimiter, which has its own")
            plain, keys = shared._like, shared._keys

        def on(line: Line) -> AsyncRateLimiter:
            return AsyncRateLimiter(limiter_on(plain, line), sleep_fn=sleep_fn)

        super().__init__(keys, on(plain._line), on)

    async def acquire(self, key: Hashable, amount: Amount = 1, timeout: float | None = None) -> bool:
        """Take `amount` for a key, waiting for it if need be; what need not wait lets no other tasks run in between.

        Args:
            key: Whose.
            amount: A number of every limit's unit, or a mapping by unit.
            timeout: Seconds to wait at most; None to wait as long as it takes.

        Returns:
            True when it is taken; False, at once and with nothing taken, if the timeout cannot be met.

        Raises:
            ValueError: It could never be had.
        """
        optional(require_at_least, "timeout", timeout, 0.0)
        if self.try_acquire(key, amount):
            return True
        amount = self._like._checked(amount)
        limiter = self._limiter_of(key)
        try:
            return await limiter.acquire(amount, timeout)
        finally:
            del limiter
            self._keys.tidy(key)

    def reserve(self, key: Hashable, amount: Amount = 1) -> AsyncReservation:
        """Take a place in the line of a key, without waiting there: see `RateLimiter.reserve`.

        Raises:
            ValueError: It could never be had.
        """
        amount = self._like._checked(amount)
        return self._limiter_of(key).reserve(amount)
