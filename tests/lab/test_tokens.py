"""Texts as tokens: padding that nothing sees, and a BOS token for models that know one."""

from __future__ import annotations

import torch

from steerserve.lab.activations import MASSIVE_NORM_RATIO, activations_of, ordinary_rows
from steerserve.lab.tokens import bos_of, pack_contexts, padded, tokenize
from steerserve.models.loading import LoadedModel
from steerserve.types import Site, Stream

SITE = Site(1, Stream.RESID_POST)
BOS = 257


def test_rows_are_padded_on_the_right() -> None:
    tokens, real = padded([[5, 6, 7], torch.tensor([8], dtype=torch.int32), ()])
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0], [0, 0, 0]]
    assert real.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert tokens.dtype == torch.int64


def test_texts_are_cut_to_one_length(tiny: LoadedModel, token_id) -> None:
    batch = tokenize(tiny, ["word " * 100, "x"], 48)
    assert batch.tokens.shape == (2, 48)
    assert batch.tokens[1, 0] == token_id("x")
    assert batch.real.sum(1).tolist() == [48, 1]
    assert torch.equal(batch.real, batch.text)


def test_a_text_is_read_as_it_is_alone(tiny: LoadedModel) -> None:
    batch = tokenize(tiny, ["a text that is longer", "short"], 48)
    alone = tokenize(tiny, ["short"], 48)
    x, y = (activations_of(tiny, each.tokens, (SITE,))[SITE] for each in (batch, alone))
    torch.testing.assert_close(x[1, batch.real[1]], y[0])


def test_padding_does_not_say_which_rows_are_ordinary() -> None:
    """Rows of norm 1 and one of 20; padding of norm 100 would make that one look ordinary."""
    x = torch.ones(1, 12, 1)
    x[0, 3] = 20
    x[0, 5:] = 100
    real = torch.arange(12)[None] < 5
    assert ordinary_rows(x, real)[0].nonzero().flatten().tolist() == [1, 2, 4]
    assert ordinary_rows(x[:, :5])[0].nonzero().flatten().tolist() == [1, 2, 4]
    assert ordinary_rows(x)[0, 3], f"20 is below {MASSIVE_NORM_RATIO:g} times the median of all"


def test_where_the_tokenizer_adds_a_bos_so_do_contexts_and_texts(
    with_bos: LoadedModel, tiny: LoadedModel, sentences: list[str]
) -> None:
    assert bos_of(with_bos) == [BOS]
    assert bos_of(tiny) == []
    contexts = torch.stack(list(pack_contexts(with_bos, sentences, 17)))
    assert (contexts[:, 0] == BOS).all()
    assert torch.equal(contexts[:, 1:], torch.stack(list(pack_contexts(tiny, sentences, 16))))
    batch = tokenize(with_bos, ["ab", "abcdef"], 4)
    assert batch.tokens[:, 0].tolist() == [BOS, BOS]
    assert torch.equal(batch.tokens[:, 1:], tokenize(tiny, ["ab", "abcdef"], 4).tokens)
    assert batch.real.sum(1).tolist() == [3, 5]
    assert batch.text.sum(1).tolist() == [2, 4]
    assert not batch.text[:, 0].any()
