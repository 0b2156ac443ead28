"""A short run of fuzz.py; the long one is started by hand."""

from __future__ import annotations

import pytest
from fuzz import damage, try_kind
from readers import KINDS

TRIES = 12


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_read_or_refused_in_one_line(name, tmp_path):
    outcome = try_kind(name, TRIES, seed=1, out=tmp_path)
    assert outcome.tries == TRIES and not outcome.faults, outcome.examples
    assert outcome.read + outcome.refused == TRIES


def test_faults_are_found(tmp_path, monkeypatch):
    """A reader that breaks in any other way is not taken for one that refuses."""

    def broken(path):
        if path.read_text() != "whole":
            raise KeyError("x")

    def make(folder):
        (folder / "file").write_text("whole")
        return folder / "file"

    def silent(path):
        if path.read_text(errors="replace") != "whole":
            raise ValueError("it is wrong")

    kind = KINDS["split.json"]
    monkeypatch.setitem(KINDS, "broken", type(kind)(make, broken))
    monkeypatch.setitem(KINDS, "silent", type(kind)(make, silent))
    found = try_kind("broken", 3, seed=0, out=tmp_path)
    assert sum(found.faults.values()) == 3 - found.read
    found = try_kind("silent", 3, seed=0, out=tmp_path)
    assert any(fault.startswith("no file is named") for fault in found.faults)


def test_damage_depends_on_the_seed_alone():
    import numpy as np

    data = bytes(range(256)) * 8
    made = [damage(data, np.random.default_rng(i // 2), text=False) for i in range(8)]
    assert made[0] == made[1] and made[6] == made[7]
    assert len(set(made)) == 4 and data not in made
