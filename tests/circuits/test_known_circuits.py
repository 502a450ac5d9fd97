"""Circuits that are known because the weights were set by hand."""

from __future__ import annotations

import pytest
import torch
from hand_built import head, layer, model, pairs

from steerserve.circuits.ablation import Ablation, Baseline
from steerserve.circuits.acdc import discover
from steerserve.circuits.metrics import Metric
from steerserve.circuits.settings import ACDCConfig, ParentOrder

BIT, FIRST, SECOND, LAST, A, B, OUT = range(7)
"""What each dimension of the gates' stream holds: a token's bit, its position, what the heads found, the result."""


def one_hot(rows: int, *columns: int) -> torch.Tensor:
    matrix = torch.zeros(len(columns), rows, dtype=torch.float64)
    matrix[range(len(columns)), columns] = 1.0
    return matrix


def gate(function) -> object:
    """Head 0 fetches the bit of the first token, head 1 that of the second; the MLP combines them."""

    def mlp(x: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(x)
        result[..., OUT] = function(x[..., A], x[..., B])
        return result

    heads = [
        head(7, 1, q={LAST: 0}, k={place: 0}, v={BIT: 0}, writes={0: found})
        for place, found in ((FIRST, A), (SECOND, B))
    ]
    tokens = torch.stack((torch.zeros(7, dtype=torch.float64), one_hot(7, BIT)[0]))
    return model(tokens, one_hot(7, FIRST, SECOND, LAST), [layer(heads, mlp)], one_hot(7, OUT).T)


def conjunction(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a + b - 1).relu()


def disjunction(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a + b).relu() - (a + b - 1).relu()


def kept(sliced, prompts, metric, order=ParentOrder.LATER_FIRST, ablation=Ablation.CORRUPTED) -> set[str]:
    graph = sliced.graph()
    found = discover(graph, Baseline(sliced, prompts, ablation), metric, ACDCConfig(0.1, order))
    return {graph.edge_name(each.receiver, each.source) for each in found.decisions if each.kept}


LOST = Metric("lost", "1 − the gate's result", lambda logits: 1 - logits[..., 0])
BITS = pairs([[1, 1, 0]], [[0, 0, 0]])
BOTH = {"m0->logits", "a0.h0->m0", "a0.h1->m0", "input->a0.h0<v>", "input->a0.h1<v>"}


@pytest.mark.parametrize("order", list(ParentOrder))
def test_a_conjunction_needs_both_of_its_inputs(order) -> None:
    assert kept(gate(conjunction), BITS, LOST, order) == BOTH


@pytest.mark.parametrize(("order", "head"), [(ParentOrder.LATER_FIRST, "a0.h0"), (ParentOrder.EARLIER_FIRST, "a0.h1")])
def test_of_a_disjunction_the_input_tested_last_remains(order, head) -> None:
    assert kept(gate(disjunction), BITS, LOST, order) == {"m0->logits", f"{head}->m0", f"input->{head}<v>"}


def test_zero_ablation_also_finds_what_both_prompts_share() -> None:
    """The positions, by which the heads look."""
    where = {f"input->a0.h{head}<{kind}>" for head in range(2) for kind in "qk"}
    assert kept(gate(conjunction), BITS, LOST, ablation=Ablation.ZERO) == BOTH | where


def induction(num_tokens: int, length: int) -> object:
    """Layer 0 notes behind each token which one came before it; layer 1 looks for the place behind the current token.

    Stream: the token, its position, the token before, the prediction. Head 1 of each layer writes what nobody reads.
    """
    token, place, before, out = 0, num_tokens, num_tokens + length, 2 * num_tokens + length
    width, d_head = 3 * num_tokens + length + 1, max(num_tokens, length)
    words = range(num_tokens)
    copies = {token + i: i for i in words}
    previous = head(
        width,
        d_head,
        q={place + i: i for i in range(1, length)},
        k={place + i: i + 1 for i in range(length - 1)},
        v=copies,
        writes={i: before + i for i in words},
    )
    match = head(width, d_head, copies, {before + i: i for i in words}, copies, {i: out + i for i in words})
    idle = head(width, d_head, copies, copies, copies, {0: width - 1})
    embedding, positions = one_hot(width, *words), one_hot(width, *range(place, place + length))
    return model(
        embedding,
        positions,
        [layer([previous, idle]), layer([match, idle])],
        one_hot(width, *range(out, out + num_tokens)).T,
    )


def test_induction_is_found_edge_by_edge() -> None:
    """… 3 5 … 3: the answer is 5. Another prompt repeats another pair."""
    prompts = pairs([[0, 3, 5, 1, 2, 3], [3, 4, 0, 1, 2, 3]], [[0, 2, 1, 5, 4, 3], [1, 0, 2, 3, 0, 3]])
    right = torch.tensor([5, 4])
    metric = Metric("lost", "1 − the answer's logit", lambda x: 1 - x[..., range(2), right])
    found = kept(induction(6, 6), prompts, metric)
    assert found == {"a1.h0->logits", "a0.h0->a1.h0<k>", "input->a1.h0<v>", "input->a0.h0<v>"}


def fraction_previous() -> object:
    """The share of tokens so far that are 1: a head that looks everywhere alike, and one that nobody reads."""
    counting = head(4, 1, q={}, k={}, v={0: 0}, writes={0: 2})
    idle = head(4, 1, q={}, k={}, v={0: 0}, writes={0: 3})
    tokens = torch.stack((torch.zeros(4, dtype=torch.float64), one_hot(4, 0)[0]))
    return model(tokens, one_hot(4, 1, 1, 1, 1), [layer([idle, counting])], one_hot(4, 2).T)


def test_fraction_previous_is_one_head() -> None:
    metric = Metric("error", "distance from 3/4", lambda logits: (logits[..., 0] - 0.75).abs())
    found = kept(fraction_previous(), pairs([[1, 1, 1, 0]], [[0, 0, 1, 0]]), metric)
    assert found == {"a0.h1->logits", "input->a0.h1<v>"}
