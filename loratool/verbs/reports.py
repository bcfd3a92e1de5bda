"""What the reports of all verbs have in common. No torch, which some verbs do without."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The base of all reports of what a verb did; `warnings` are sentences that the user should read."""

    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedReport(Report):
    """A report of a verb that takes time and memory: how much of both, and on which device for what reason."""

    seconds: float = 0.0
    peak_bytes: int = 0
    device: str = "cpu"
    device_reason: str = ""


AnyTimedReport = TypeVar("AnyTimedReport", bound=TimedReport)


class Stopwatch:
    """Measures the time from its creation to `stop`."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def stop(self, report: AnyTimedReport) -> AnyTimedReport:
        """The report with the seconds that have passed, and the most memory that the process has held."""
        # Imported late, since `numbers.threads` needs torch, and reports of verbs without torch are in this module too.
        from loratool.numbers.threads import peak_bytes

        return replace(report, seconds=time.monotonic() - self._started, peak_bytes=peak_bytes())


class HasError(Protocol):
    """A module's figures that have a relative error."""

    @property
    def error(self) -> float:
        """‖ΔW − what is stored‖ / ‖ΔW‖."""


Erroneous = TypeVar("Erroneous", bound=HasError)


def worst_of(modules: Iterable[Erroneous]) -> Erroneous | None:
    """The module with the largest relative error; None where there is no module."""
    return max(modules, key=lambda module: module.error, default=None)
