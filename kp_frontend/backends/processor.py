"""What the processor can do, read from Linux's /proc/cpuinfo."""

from __future__ import annotations

import functools
from pathlib import Path

# Instructions that multiply and add eight-bit numbers: on x86 four times as many as fp32 in one
# step. Arm's (asimddp, i8mm) are left out: OpenVINO's int8 kernels have not been measured there.
INT8_DOT_PRODUCTS = ("avx512_vnni", "avx_vnni", "amx_int8")


@functools.cache
def processor() -> dict[str, str]:
    """The entries of /proc/cpuinfo, those of the last core; empty on other systems."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    entries = (line.split(":", 1) for line in lines if ":" in line)
    return {name.strip(): value.strip() for name, value in entries}


def features() -> set[str]:
    """Instruction sets by the names that Linux gives them."""
    return set(processor().get("flags", processor().get("Features", "")).split())


def int8_dot_products() -> str | None:
    """The first instruction set with int8 dot products that the processor has, or None."""
    return next((name for name in INT8_DOT_PRODUCTS if name in features()), None)
