"""What came next the last time: plain induction, and the parameters of a Python docstring.

* ``induction``: a list of words begins again, and goes on as before; in the corrupted prompt the last word stood not
  in the list the first time, but another in its place.
* ``docstring`` (Heimersheim and Janiak 2023): parameters are documented in the order of the signature; in the
  corrupted prompt the signature lists others.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from transformers import PreTrainedTokenizerBase

from steerserve.circuits.prompts import PairText, Split
from steerserve.circuits.tasks.task import Task, part, single_tokens

WORDS = (
    "apple", "river", "stone", "cloud", "horse", "window", "paper", "garden", "silver", "bridge", "winter", "doctor",
    "mountain", "music", "table", "engine", "forest", "letter", "market", "island", "summer", "bottle", "castle",
    "dragon", "farmer", "gold", "hammer", "king", "lamp", "mirror", "needle", "ocean", "prince", "queen", "road",
    "ship", "tower", "valley", "water", "yellow", "bread", "chair", "desert", "eagle", "flower", "glass", "house",
    "iron",
)  # fmt: skip
PARAMETERS = (
    "files", "state", "size", "shape", "option", "path", "name", "value", "key", "index", "count", "data", "model",
    "color", "width", "height", "order", "level", "mode", "text", "code", "date", "time", "user", "group", "list",
    "table", "field", "line", "page", "image", "point",
)  # fmt: skip
LIST_LENGTH = 6


def draw_induction(tokenizer: PreTrainedTokenizerBase, rng: Random, split: Split) -> Iterator[PairText]:
    """A list of different words, up to a random place in its second round."""
    words = single_tokens(tokenizer, part(WORDS, split), at_least=LIST_LENGTH + 2)
    while True:
        *first, other, answer = rng.sample(words, LIST_LENGTH + 2)
        at = rng.randrange(1, LIST_LENGTH)
        first[at] = answer
        again = first[:at]
        swapped = [*first[: at - 1], other, *first[at:]]
        clean, corrupted = (f"The {' '.join([*listed, *again])}" for listed in (first, swapped))
        yield PairText(clean, corrupted, (f" {answer}",), tuple(f" {word}" for word in first if word != answer))


def draw_docstring(tokenizer: PreTrainedTokenizerBase, rng: Random, split: Split) -> Iterator[PairText]:
    """Two parameters are documented, the third one's turn has come."""
    names = single_tokens(tokenizer, part(PARAMETERS, split), at_least=10)
    words = single_tokens(tokenizer, WORDS, at_least=4)
    while True:
        *signature, a, b, c, d, e = rng.sample(names, 10)
        about = rng.sample(words, 4)
        documented = (
            f'    """{about[0]} {about[1]}\n\n    :param {signature[0]}: {about[2]}\n'
            f"    :param {signature[1]}: {about[3]}\n    :param"
        )
        clean, corrupted = (
            f"def function(self, {', '.join(listed)}):\n{documented}" for listed in (signature, (a, b, c, d, e))
        )
        wrong = [name for name in (*signature, a, b, c, d, e) if name != signature[2]]
        yield PairText(clean, corrupted, (f" {signature[2]}",), tuple(f" {name}" for name in wrong))


INDUCTION = Task("induction", "logit_difference", draw_induction)
DOCSTRING = Task("docstring", "logit_difference", draw_docstring)
