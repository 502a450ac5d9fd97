"""The built-in tasks by name."""

from __future__ import annotations

from steerserve.circuits.tasks.capitals import CAPITALS
from steerserve.circuits.tasks.greater_than import GREATER_THAN
from steerserve.circuits.tasks.ioi import IOI
from steerserve.circuits.tasks.pronouns import PRONOUNS
from steerserve.circuits.tasks.repetition import DOCSTRING, INDUCTION

TASKS = {task.name: task for task in (IOI, GREATER_THAN, CAPITALS, PRONOUNS, INDUCTION, DOCSTRING)}
"""All but profanity, whose pairs are searched for with the model itself (``tasks.profanity``)."""
