"""A text of any length is read whole: every token falls into a window, with the characters it covers."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from steerserve.serving.reading import _windows


@settings(deadline=None, max_examples=60)
@given(
    words=st.lists(st.sampled_from(["calm", " storm", "é", "\n", " 💥", "x" * 20]), max_size=60),
    size=st.integers(4, 40),
)
def test_windows_cover_every_token_and_overlap(tokenizer, words, size) -> None:
    text = "".join(words)
    windows = list(_windows(tokenizer, text, size))
    expected = tokenizer(text, return_offsets_mapping=True)
    assert all(0 < len(window.token_ids) <= size for window in windows)
    read = {pair for window in windows for pair in zip(window.token_ids, window.spans, strict=True)}
    assert read == {(i, tuple(span)) for i, span in zip(expected["input_ids"], expected["offset_mapping"], strict=True)}
    for before, after in itertools.pairwise(windows):
        overlap = len(before.spans) // 4
        assert before.spans[len(before.spans) - overlap :] == after.spans[:overlap]
