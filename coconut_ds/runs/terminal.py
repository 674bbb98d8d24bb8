"""Lines and progress bars on the terminal, from rank 0 only; output of libraries goes to a log."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

from tqdm import tqdm

from coconut_ds.errors import unwritable_save_path
from coconut_ds.runtime import distributed

Item = TypeVar("Item")
_PLAIN_LINES_PER_EPOCH = 4
_PLAIN_LINES_APART_S = 10
_WEIGHT_OF_THE_LATEST = 0.1


class _Streams(NamedTuple):
    """Where lines and bars go."""

    lines: IO[str]
    bars: IO[str]


_diverted: list[_Streams] = []
"""Of every active `libraries_to`, the innermost last."""


def quiet_libraries() -> None:
    """No bars of libraries (two ranks loading weights would draw over each other), no advice meant for DeepSpeed."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # From transformers 5.24 on it has a new name, which 5.23 does not know.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`past_key_values` is deprecated")
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


@contextlib.contextmanager
def libraries_to(log: Path | None) -> Iterator[None]:
    """Append everything this process prints to `log`, except `say` and the bars; None shows it.

    File descriptors are diverted and not only Python's streams, because gloo, NCCL and compilers write by themselves.
    Raises InputError if the log cannot be written.
    """
    with contextlib.ExitStack() as undo:
        if log is not None:
            _diverted.append(_divert(log, undo))
            undo.callback(_diverted.pop)
        # Imported only once their output is diverted.
        import datasets
        import transformers

        if not datasets.are_progress_bars_disabled():
            undo.callback(datasets.enable_progress_bars)
        if transformers.logging.is_progress_bar_enabled():
            undo.callback(transformers.logging.enable_progress_bar)
        quiet_libraries()
        yield


def _divert(log: Path, undo: contextlib.ExitStack) -> _Streams:
    """Let descriptors and Python's streams lead to `log`; the streams to what they led to. `undo` takes it back.

    Each part by itself: where the disk of the log is full, or a reader has left, the error is still to be shown.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = open(log, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise unwritable_save_path(log.parent, error) from None
    undo.callback(_attempt, file.close)
    streams = []
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        own = os.dup(number)
        undo.callback(os.close, own)
        shown = stream
        with contextlib.suppress(OSError, ValueError):  # of a stream without a descriptor
            if stream.fileno() == number:
                shown = open(os.dup(own), "w", buffering=1, encoding="utf-8")  # noqa: SIM115
                undo.callback(_attempt, shown.close)
        undo.callback(os.dup2, own, number)
        os.dup2(file.fileno(), number)
        undo.callback(_attempt, stream.flush)
        streams.append(shown)
    undo.enter_context(contextlib.redirect_stdout(file))
    undo.enter_context(contextlib.redirect_stderr(file))
    undo.callback(_attempt, file.flush)
    return _Streams(*streams)


def _attempt(call: Callable[[], object]) -> None:
    with contextlib.suppress(OSError, ValueError):
        call()


def _streams() -> _Streams:
    streams = _diverted[-1] if _diverted else _Streams(sys.stdout, sys.stderr)
    # On one terminal a line has to know of the bar below it, which tqdm sees to within one stream.
    return _Streams(streams.bars, streams.bars) if streams.lines.isatty() and streams.bars.isatty() else streams


def terminal() -> IO[str]:
    """The stream for messages about failures."""
    return _streams().bars


def say(text: str) -> None:
    """Print lines from rank 0."""
    if distributed.is_main():
        stream = _streams().lines
        tqdm.write(text, file=stream)
        stream.flush()


def log_line(text: str) -> None:
    """Print a line on rank 0 to where library output goes: `run.log`, or the terminal with `--verbose`."""
    if distributed.is_main():
        print(text, flush=True)


def progress(items: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    """Yield `items`, with a bar on a terminal that disappears at their end."""
    bars = _streams().bars
    hidden = not (distributed.is_main() and bars.isatty())
    yield from tqdm(items, total=total, desc=label, leave=False, dynamic_ncols=True, file=bars, disable=hidden)


class Pace:
    """Expects `steps` more optimizer steps and `evaluations`, each as long as lately; times in seconds."""

    def __init__(self, steps: int, evaluations: int):
        self._steps, self._evaluations = steps, evaluations
        self._step_s = self._evaluation_s = 0.0
        self.examples_per_s = 0.0
        """Moving average over the latest steps."""

    def stepped(self, n_examples: int, seconds: float) -> None:
        weight = _WEIGHT_OF_THE_LATEST if self._step_s else 1
        self._steps -= 1
        self._step_s += weight * (seconds - self._step_s)
        self.examples_per_s += weight * (n_examples / seconds - self.examples_per_s)

    def evaluated(self, seconds: float) -> None:
        self._evaluations -= 1
        self._evaluation_s = seconds

    def seconds_for(self, steps: int) -> float:
        return steps * self._step_s

    def seconds_left(self) -> float:
        """Of the whole run."""
        return self.seconds_for(self._steps) + self._evaluations * self._evaluation_s


class EpochProgress:
    """The steps of an epoch: a bar on a terminal, a few plain lines elsewhere; used with `with`."""

    def __init__(self, label: str, total: int, pace: Pace):
        self._label, self._total, self._pace = label, total, pace
        self._done = 0
        bars = _streams().bars
        self._is_plain = not bars.isatty()
        self._bar = tqdm(
            total=total,
            desc=label,
            leave=False,
            dynamic_ncols=True,
            file=bars,
            disable=self._is_plain or not distributed.is_main(),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
        )
        self._last_line = time.monotonic()

    def __enter__(self) -> EpochProgress:
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.close()

    def step(self, loss: float, remark: str = "") -> None:
        """Count one more step, after `pace.stepped`; `remark` is shown beside the loss."""
        self._done += 1
        if not self._is_plain:
            self._bar.set_postfix_str(self._figures(loss, remark), refresh=False)
            self._bar.update()
            return
        is_due = self._done % max(1, self._total // _PLAIN_LINES_PER_EPOCH) == 0 and self._done < self._total
        now = time.monotonic()
        if is_due and now - self._last_line >= _PLAIN_LINES_APART_S:
            self._last_line = now
            say(f"{self._label}: {self._done}/{self._total}, {self._figures(loss, remark)}")

    def _figures(self, loss: float, remark: str) -> str:
        pace = self._pace
        epoch, run = _duration(pace.seconds_for(self._total - self._done)), _duration(pace.seconds_left())
        remark = f", {remark}" if remark else ""
        return f"loss {loss:.3f}{remark}, {pace.examples_per_s:.3g} examples/s, ETA {epoch} this epoch, {run} this run"


def _duration(seconds: float) -> str:
    """Minutes and seconds, `1:40`, and hours if there are any, `2:01:40`."""
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{whole:02d}" if hours else f"{minutes}:{whole:02d}"
