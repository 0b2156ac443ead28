"""The log of a run: progress bar, `log.jsonl`, TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Span(NamedTuple):
    """A stage among the steps of a whole recipe: its name, steps before it, and all steps."""

    name: str
    before: int
    total: int


class RunLog:
    """Writes rows of values. A resumed run first drops the rows after its checkpoint."""

    def __init__(self, out: Path, span: Span, start: int, quiet: bool) -> None:
        self.out, self.span, self.start, self.quiet = out, span, start, quiet
        self.console = Console(quiet=quiet)
        self.bar = Progress(
            TextColumn(f"{span.name} step {{task.completed:.0f}}/{{task.total:.0f}}".lstrip()),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=span.total, completed=span.before + start)
        self._since = {"images": 0, "seconds": 0.0, "waited": 0.0}
        self._rows: list[dict[str, float]] = []

    def __enter__(self) -> RunLog:
        if not self.quiet:
            path = self.out / "log.jsonl"
            rows = [row for row in read_log(path) if row["step"] <= self.start]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            self._file = path.open("a")
            self._board = _tensorboard(self.out, self.start, self.console)
        if self.start:
            self.console.print(f"resuming at step {self.start}")
        self.bar.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        if not self.quiet:
            self._file.close()
            if self._board:
                self._board.close()

    def step(
        self, step: int, row: dict[str, float], images: int, seconds: float, waited: float,
        every: int,
    ) -> None:  # fmt: skip
        """Count a step. After `every` steps, write a row with their means and rates."""
        self._rows.append(row)
        for name, value in (("images", images), ("seconds", seconds), ("waited", waited)):
            self._since[name] += value
        if step % every == 0:
            self._training(step)

    def _training(self, step: int) -> None:
        spent = self._since
        if self.quiet or not self._rows:
            return
        row = {
            "step": step,
            **{n: sum(r[n] for r in self._rows) / len(self._rows) for n in self._rows[0]},
            "images_per_s": spent["images"] / spent["seconds"],
            "data_wait": spent["waited"] / spent["seconds"],
        }
        self._since, self._rows = dict.fromkeys(spent, 0.0), []
        self._write(row, "training")
        self.bar.update(self.task, completed=self.span.before + step, description=describe(row))

    def validation(self, step: int, row: dict[str, float]) -> None:
        """Write a validation row, after the training row that completes it."""
        self._training(step)
        self._write({"step": step, **{f"validation_{k}": v for k, v in row.items()}}, "validation")
        self.console.print(f"step {step}, held-out images: {describe(row)}", soft_wrap=True)

    def _write(self, row: dict[str, Any], group: str) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board:
            for name, value in row.items():
                if name != "step" and value is not None:
                    tag = f"{group}/{name.removeprefix('validation_')}"
                    self._board.add_scalar(tag, value, row["step"])


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's `log.jsonl`; an incomplete last line is skipped."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


def describe(row: dict[str, float]) -> str:
    """The values of a row as text."""
    shown = {"images_per_s": "{:.0f} images/s", "data_wait": "waiting {:.0%}", "step": ""}
    words = [
        shown.get(name, f"{name} {{:.3g}}").format(value)
        for name, value in row.items()
        if value is not None
    ]
    return "  ".join(word for word in words if word)


def _tensorboard(out: Path, start: int, console: Console) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        console.print(
            "TensorBoard logs are not written: the package `tensorboard` is not installed"
        )
        return None
    return SummaryWriter(str(out), purge_step=start + 1 if start else None)
