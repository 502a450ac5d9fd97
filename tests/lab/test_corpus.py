"""Splits that follow from the text alone, and files whose faults are named."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerserve.errors import AssetError
from steerserve.lab import corpus as corpus_module
from steerserve.lab.corpus import Document, HubDataset, Split, TextFile, TextStream, read_documents


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
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=2, unique=True)
)
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
    ("line", "message"),
    [
        ("{", "not valid JSON text: Expecting property name"),
        (r'{"text": "\ud800"}', "not valid JSON text: 'utf-8' codec can't encode"),
        ("[" * 100_000, "not valid JSON text"),
        *((line, "expected a JSON object with a 'text' field") for line in ("[1, 2]", '"just a string"', "{}", "null")),
        *((f'{{"{key}": {value}}}', "expected a JSON object") for key, value in [("txt", '"x"'), ("text", 5)]),
    ],
)
def test_a_line_without_text_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(AssetError, match=rf"corpus\.jsonl:3: {message}"):
        read_documents([path], Split.TRAIN)


def test_files_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("text\nhello\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    (tmp_path / "plain.jsonl.gz").write_text('{"text": "not compressed"}\n')
    whole = gzip.compress("".join(f'{{"text": "text {number}"}}\n' for number in range(500)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    (tmp_path / "spoilt.jsonl.gz").write_bytes(whole[:200] + b"\xff" * 100 + whole[300:])
    (tmp_path / "directory.txt").mkdir()
    (tmp_path / "latin.txt").write_bytes("first\ngrüße\n".encode("latin-1"))
    for name, message in {
        "nowhere.jsonl": "does not exist",
        "table.csv": r"expected a \.jsonl, \.jsonl\.gz, \.txt or \.txt\.gz file",
        "empty.jsonl": "holds no text",
        "blank.txt": "holds no text",
        "blank.jsonl": "holds no text",
        "plain.jsonl.gz": "cannot be read: Not a gzipped file",
        "cut.jsonl.gz": "cannot be read: Compressed file ended",
        "spoilt.jsonl.gz": "",
        "directory.txt": "cannot be read: .*Is a directory",
        "latin.txt": ":2: expected UTF-8, but byte 2 is 0xfc",
    }.items():
        with pytest.raises(AssetError, match=f"{name}:?.*{message}"):
            read_documents([tmp_path / name], Split.TRAIN)


def test_the_marks_of_windows_are_no_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    documents = [doc for docs in read_all(tmp_path / "a.txt").values() for doc in docs]
    assert sorted(doc.text for doc in documents) == ["one", "two"]


TEXTS = [f"text {number}" for number in range(300)]


def test_a_corpus_streams_what_read_documents_reads(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl.gz", TEXTS)
    corpus = TextStream([TextFile(path)], Split.TRAIN)
    expected = [doc.text for doc in read_documents([path], Split.TRAIN)]
    assert list(corpus) == expected
    assert list(corpus) == expected  # from the beginning again


def test_blocks_keep_every_text_and_are_shuffled_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "SHUFFLED_CHARACTERS", 1000)
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    texts = list(TextStream([TextFile(path)], Split.TRAIN))
    in_order = [text for text in TEXTS if Split.of(text) is Split.TRAIN]
    assert sorted(texts) == sorted(in_order)
    assert texts != in_order
    assert set(texts[:100]) < set(in_order[:250])  # 1,000 characters are about 120 of these
    with path.open("a") as file:
        file.write("{")
    read = iter(TextStream([TextFile(path)], Split.TRAIN))
    assert [next(read) for _ in range(100)] == texts[:100]  # before the end of the file is looked at


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_the_share_done_goes_from_0_to_1(tmp_path: Path, suffix: str) -> None:
    paths = [write_jsonl(tmp_path / f"{name}{suffix}", TEXTS) for name in "ab"]
    corpus = TextStream([TextFile(path) for path in paths], Split.TRAIN)
    shares = [corpus.share_done or 0.0 for _ in corpus]
    assert shares == sorted(shares)
    assert shares[0] <= 0.5
    assert shares[-1] == pytest.approx(1, abs=0.02)


def test_another_field_can_hold_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "hello"}\n')
    assert list(TextStream([TextFile(path, "body")], Split.of("hello"))) == ["hello"]
    with pytest.raises(AssetError, match=r"a\.jsonl:1: expected a JSON object with a 'text' field"):
        list(TextStream([TextFile(path)], Split.TRAIN))


def test_a_split_without_text_is_an_error_for_a_corpus(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["text 1"])  # of the train split
    with pytest.raises(AssetError, match=r"a\.jsonl: no text falls into the test split"):
        list(TextStream([TextFile(path)], Split.TEST))


@pytest.fixture(params=["parquet", "saved split", "saved splits"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A directory as ``datasets`` finds or writes it."""
    made = datasets.Dataset.from_dict({"text": TEXTS, "number": list(range(len(TEXTS)))})
    directory = tmp_path / "dataset"
    if request.param == "parquet":
        directory.mkdir()
        made.to_parquet(directory / "train.parquet")
    elif request.param == "saved split":
        made.save_to_disk(directory)
    else:
        datasets.DatasetDict({"train": made}).save_to_disk(directory)
    return str(directory)


def test_a_dataset_is_read_like_a_file(dataset: str, tmp_path: Path) -> None:
    corpus = TextStream([HubDataset(dataset)], Split.TRAIN)
    assert list(corpus) == list(TextStream([TextFile(write_jsonl(tmp_path / "a.jsonl", TEXTS))], Split.TRAIN))
    assert corpus.share_done is None


def test_datasets_that_are_refused(dataset: str) -> None:
    for source, message in (
        (HubDataset(dataset, text_field="txt"), "row 0: expected a string in field 'txt'; its fields are text, number"),
        (HubDataset(dataset, text_field="number"), "row 0: expected a string in field 'number'"),
        (HubDataset(dataset, split="tset"), "split tset"),
    ):
        with pytest.raises(AssetError, match=message):
            list(TextStream([source], Split.TRAIN))


def test_a_directory_without_a_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"dataset .*, split train: "):
        list(TextStream([HubDataset(str(tmp_path))], Split.TRAIN))


@pytest.mark.parametrize(
    ("fields", "label"),
    [({"label": None}, ""), ({"label": None, "source": "web"}, "web"), ({"label": 0, "source": "web"}, "0")],
)
def test_a_label_of_null_is_none(tmp_path: Path, fields: dict[str, Any], label: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "a river", **fields}))
    (document,) = read_documents([path], Split.of("a river"))
    assert document.label == label
