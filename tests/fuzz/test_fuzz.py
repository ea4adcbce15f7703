"""Hostile input is refused in a sentence: the corpus, and changes of it."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.structured import DOCUMENTS, as_bytes
from tests.fuzz.structured import changed as restructured
from tests.fuzz.targets import SEEDS, TARGETS

CASES = [(name, i) for name, seeds in SEEDS.items() for i in range(len(seeds))]


@pytest.mark.parametrize(("name", "i"), CASES)
def test_the_corpus_is_read_or_refused_within_little_memory(name: str, i: int) -> None:
    TARGETS[name](SEEDS[name][0])  # imports and caches
    tracemalloc.start()
    try:
        TARGETS[name](SEEDS[name][i])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 48 << 20


@st.composite
def changed(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed with some bytes overwritten, removed or inserted."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 4))
        data[at : at + length] = draw(st.binary(max_size=4))
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(data=st.data())
def test_changes_of_the_corpus_are_read_or_refused(name: str, data: st.DataObject) -> None:
    TARGETS[name](data.draw(changed(SEEDS[name])))


@pytest.mark.parametrize("name", DOCUMENTS)
@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(data=st.data())
def test_documents_of_another_structure_are_read_or_refused(name: str, data: st.DataObject) -> None:
    document = data.draw(st.sampled_from(DOCUMENTS[name]))
    chance = data.draw(st.randoms(use_true_random=False))
    TARGETS[name](as_bytes(restructured(document, chance)))
