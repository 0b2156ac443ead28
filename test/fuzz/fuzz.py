"""Damages every kind of file that a command reads, thousands of times, and reads it.

    .venv/bin/python test/fuzz/fuzz.py --tries 2000 --out fuzz_out

A reader may read a damaged file or refuse it with one line. Anything else is a fault: another
exception, words that show a Python object, more than LIMIT_S seconds, or the end of the process.
The damage depends on the seed, the kind and the number of the try alone. Damaged files that led to
a fault are kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

os.environ["OPENCV_LOG_LEVEL"] = "OFF"
HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent, HERE.parents[1]):  # this checkout, not what is installed
    sys.path.insert(0, str(folder))

LIMIT_S = 20  # a reader that takes longer hangs, for the files are small
MEMORY = 16 << 30  # bytes of address space; a size in a file must not be believed
MOST_WORDS = 1000  # letters of a message
OBJECT = re.compile(r" object at 0x|<class |Traceback|^['\"]?[\w.]*['\"]?$")
WORDS = (
    b"", b"0", b"-1", b"1e400", b"nan", b"null", b"true", b"[]", b"{}", b"[", b"}", b"'", b'"x"',
    b"999999999999999999999999", b"&a", b"*a", b"!!binary", b"\xff\xfe", b"\0", b"a: b", b"../..",
)  # fmt: skip


@dataclass
class Outcome:
    """What came of the tries on one kind of file."""

    kind: str
    tries: int = 0
    read: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)  # of each fault: a file and a traceback


class TooLong(BaseException):
    """A reader hangs."""


def damage(data: bytes, rng: np.random.Generator, text: bool) -> bytes:
    """One to three damages of the bytes of a file."""
    for _ in range(rng.integers(1, 4)):
        size = len(data)
        if not size:
            return data
        # Headers are small: half of the damage is near the beginning or the end.
        at = int(rng.integers(min(size, 1000)))
        at = (at, size - 1 - at, *rng.integers(size, size=2).tolist())[int(rng.integers(4))]
        length = int(min(size - at, rng.integers(1, 64)))
        way = rng.integers(8 if text else 6)
        changed = bytearray(data)
        if way == 0:
            data = data[:at]
        elif way == 1:
            for place in rng.integers(0, size, rng.integers(1, 9)):
                changed[place] ^= 1 << int(rng.integers(8))
            data = bytes(changed)
        elif way == 2:
            changed[at : at + length] = bytes(length)
            data = bytes(changed)
        elif way == 3:
            changed[at : at + length] = rng.bytes(length)
            data = bytes(changed)
        elif way == 4:
            data = data[:at] + data[at + length :]
        elif way == 5:
            data = data[: at + length] + data[at:]
        else:
            parts = re.split(rb"([\w.+-]+)", data)
            place = 2 * int(rng.integers(max(1, len(parts) // 2))) + 1
            if place < len(parts):
                parts[place] = WORDS[int(rng.integers(len(WORDS)))]
            data = b"".join(parts)
    return data


def _alarm(*_: object) -> None:
    raise TooLong


def try_kind(name: str, tries: int, seed: int, out: Path, first: int = 0) -> Outcome:
    """Damage and read one kind of file; see the text of this module."""
    from readers import KINDS

    from kp_frontend.cli import USER_ERRORS

    kind, outcome = KINDS[name], Outcome(name)
    signal.signal(signal.SIGALRM, _alarm)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="kp_fuzz_") as scratch:
        folder = Path(scratch) / "example"
        folder.mkdir()
        file = kind.make(folder)
        whole = file.read_bytes()
        kind.read(file)  # the example itself is read
        slug = re.sub(r"\W+", "_", name)
        last = out / f"{slug}.last"  # kept if the process ends
        for i in range(first, first + tries):
            rng = np.random.default_rng([seed, zlib.crc32(name.encode()), i])
            damaged = damage(whole, rng, kind.text)
            file.write_bytes(damaged)
            last.write_bytes(damaged)
            begin, fault, trace = time.perf_counter(), "", ""
            signal.alarm(LIMIT_S)
            try:
                kind.read(file)
                outcome.read += 1
            except USER_ERRORS as error:
                outcome.refused += 1
                words = str(error)
                if OBJECT.search(words) or len(words.strip().splitlines()) != 1:
                    fault, trace = f"words: {words[:200]!r}", traceback.format_exc()
                elif not any(part.name in words for part in (file, file.parent, folder)):
                    fault, trace = f"no file is named: {words[:200]!r}", traceback.format_exc()
                elif len(words) > MOST_WORDS:
                    fault, trace = f"{MOST_WORDS} letters: {words[:200]!r}", traceback.format_exc()
            except TooLong:
                fault, trace = f"takes longer than {LIMIT_S} s", traceback.format_exc()
            except Exception as error:
                fault, trace = f"{type(error).__name__}: {str(error)[:200]}", traceback.format_exc()
            finally:
                signal.alarm(0)
            outcome.tries += 1
            outcome.slowest_s = max(outcome.slowest_s, time.perf_counter() - begin)
            if fault:
                where = [line for line in trace.splitlines() if "kp_" in line and "File" in line]
                key = f"{fault.partition(':')[0]} {where[-1].strip() if where else ''}"
                outcome.faults[key] = outcome.faults.get(key, 0) + 1
                if key not in outcome.examples:
                    shutil.copy(last, out / f"{slug}.{i}")
                    outcome.examples[key] = f"try {i}: {fault}\n{trace}"
        last.unlink(missing_ok=True)
    return outcome


def _in_process(connection, names: list[str], *arguments: object) -> None:
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for name in names:
        connection.send(asdict(try_kind(name, *arguments)))


def run_kinds(names: list[str], tries: int, seed: int, out: Path) -> Iterator[Outcome]:
    """`try_kind` in a process of its own, whose end is a fault like any other."""
    context = multiprocessing.get_context("spawn")
    left = list(names)
    while left:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_in_process, args=(sender, left, tries, seed, out))
        process.start()
        sender.close()
        try:
            while left:
                outcome = Outcome(**receiver.recv())
                left.pop(0)
                yield outcome
        except EOFError:
            process.join()
            name = left.pop(0)
            yield Outcome(name, faults={f"the process ended with status {process.exitcode}": 1})
        process.join()


def main() -> int:
    """Fuzz all kinds; 1 if there are faults."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tries", type=int, default=2000, help="of each kind (default 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", help="this one only; may be given again")
    parser.add_argument("--out", type=Path, default=Path("fuzz_out"), help="folder for faults")
    arguments = parser.parse_args()
    from readers import KINDS

    arguments.out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    print(f"{'kind':26} {'tries':>6} {'read':>6} {'refused':>7} {'faults':>6} {'slowest, s':>10}")
    names = arguments.kind or list(KINDS)
    for outcome in run_kinds(names, arguments.tries, arguments.seed, arguments.out):
        outcomes.append(outcome)
        print(
            f"{outcome.kind:26} {outcome.tries:6} {outcome.read:6} {outcome.refused:7} "
            f"{sum(outcome.faults.values()):6} {outcome.slowest_s:10.2f}",
            flush=True,
        )
        for fault, count in outcome.faults.items():
            print(f"    {count} x {fault}", flush=True)
    report = [asdict(outcome) for outcome in outcomes]
    (arguments.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return int(any(outcome.faults for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
