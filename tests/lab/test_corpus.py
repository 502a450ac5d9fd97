"""Splits that follow from the text alone, and files whose faults are named."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerserve.errors import AssetError
from steerserve.lab.corpus import Document, Split, read_documents


def write_jsonl(path: Path, texts: list[str]) -> Path:
    lines = "".join(json.dumps({"text": text, "label": "x"}) + "\n" for text in texts)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def read_all(*paths: Path) -> dict[Split, list[Document]]:
    return {split: read_documents(paths, split) for split in Split}


def test_known_texts_stay_in_their_split() -> None:
    """Figures reported on earlier splits would be void if a text changed sides."""
    splits = [Split.of(f"text {number}") for number in range(80)]
    assert [number for number, split in enumerate(splits) if split is Split.VALIDATION] == [38, 59, 70, 76]
    assert [number for number, split in enumerate(splits) if split is Split.TEST] == [22, 35, 36, 51, 60]


def test_shares_are_near_90_5_5() -> None:
    count = 20_000
    shares = Counter(Split.of(f"document {number}") for number in range(count))
    for split, share in ((Split.TRAIN, 0.9), (Split.VALIDATION, 0.05), (Split.TEST, 0.05)):
        five_sigma = 5 * (share * (1 - share) / count) ** 0.5
        assert abs(shares[split] / count - share) < five_sigma


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), unique=True))
def test_a_text_falls_on_one_side_in_whatever_file_it_comes(tmp_path_factory, texts: list[str]) -> None:
    directory = tmp_path_factory.mktemp("corpus")
    one = read_all(write_jsonl(directory / "all.jsonl", texts))
    reverse = read_all(
        write_jsonl(directory / "tail.jsonl.gz", texts[1:][::-1]), write_jsonl(directory / "head.jsonl", texts[:1])
    )
    for split in Split:
        assert {doc.text for doc in one[split]} == {doc.text for doc in reverse[split]}
    assert sorted(doc.text for docs in one.values() for doc in docs) == sorted(texts)


def test_a_text_given_twice_stays_on_its_side(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(60)]
    split = read_all(write_jsonl(tmp_path / "a.jsonl", texts), write_jsonl(tmp_path / "b.jsonl", texts))
    assert Counter(doc.text for docs in split.values() for doc in docs) == dict.fromkeys(texts, 2)
    for one, other in ((Split.TRAIN, Split.TEST), (Split.TRAIN, Split.VALIDATION), (Split.TEST, Split.VALIDATION)):
        assert not set(split[one]) & set(split[other])


def test_the_order_is_shuffled_and_the_same_every_time(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(200)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    read = [doc.text for doc in read_documents([path], Split.TRAIN)]
    assert read == [doc.text for doc in read_documents([path], Split.TRAIN)]
    assert read != [text for text in texts if Split.of(text) is Split.TRAIN]


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".jsonl", ".jsonl.gz"])
def test_kinds_of_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"corpus{suffix}"
    lines = (
        '{"text": "grüße", "label": "de", "more": 1}\n\n{"text": "hello"}\n'
        if "jsonl" in suffix
        else "grüße\n\n hello \n"
    )
    path.write_bytes(gzip.compress(lines.encode()) if suffix.endswith("gz") else lines.encode())
    documents = {doc for docs in read_all(path).values() for doc in docs}
    assert documents == {Document("grüße", "de" if "jsonl" in suffix else ""), Document("hello")}


@pytest.mark.parametrize(
    "line", ["{", "[1, 2]", '"just a string"', "{}", '{"txt": "x"}', '{"text": null}', '{"text": 5}', "null"]
)
def test_a_line_without_text_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(AssetError, match=r"corpus\.jsonl:3: expected a JSON object with a 'text' field"):
        read_documents([path], Split.TRAIN)


def test_files_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"nowhere\.jsonl does not exist"):
        read_documents([tmp_path / "nowhere.jsonl"], Split.TRAIN)
    (tmp_path / "table.csv").write_text("text\nhello\n")
    with pytest.raises(AssetError, match=r"table\.csv: expected a \.jsonl, \.jsonl\.gz or \.txt file"):
        read_documents([tmp_path / "table.csv"], Split.TRAIN)
    (tmp_path / "plain.jsonl.gz").write_text('{"text": "not compressed"}\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "cut short"}\n' * 50)[:-12])
    (tmp_path / "latin.txt").write_bytes("grüße\n".encode("latin-1"))
    for name in ("plain.jsonl.gz", "cut.jsonl.gz", "latin.txt"):
        with pytest.raises(AssetError, match=f"{name} cannot be read as UTF-8 text"):
            read_documents([tmp_path / name], Split.TRAIN)
