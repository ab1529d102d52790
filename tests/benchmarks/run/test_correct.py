"""Bits of images survive a record."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.run.correct import pack_correct, unpack_correct


@settings(max_examples=25, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_bits_survive_a_record(bits: list[bool]) -> None:
    packed = pack_correct({"top1": np.array(bits)})
    record = {"metrics": {"top1": 100 * sum(bits) / len(bits), "images": len(bits)}, "correct": packed}
    assert unpack_correct(json.loads(json.dumps(record)))["top1"].tolist() == bits


def test_an_older_record_has_none() -> None:
    assert unpack_correct({"metrics": {"top1": 50.0, "images": 2}}) == {}
