"""``python -m steerserve`` is the ``steerserve`` command."""

from __future__ import annotations

from steerserve.cli import app

app(prog_name="steerserve")
