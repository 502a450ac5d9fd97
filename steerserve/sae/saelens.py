"""Where callers still look for what moved to ``registry`` and ``formats.saelens``."""

from __future__ import annotations

from steerserve.sae.formats.saelens import save_max_activation, save_sae
from steerserve.sae.registry import load_sae

__all__ = ["load_sae", "save_max_activation", "save_sae"]
