"""Run a function on the activation of chosen sites, for the lab; serving goes through ``splice``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from steerserve.models.loading import LoadedModel
from steerserve.types import Site

SiteFunction = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def transformed(model: LoadedModel, functions: Mapping[Site, SiteFunction]) -> Iterator[None]:
    """Forward passes inside the block go on with ``functions[site](activation)``, ``[B, T, d]`` each.

    A function that only reads returns its argument.
    """
    with ExitStack() as stack:
        for site, function in functions.items():
            stack.enter_context(_hooked(model, site, function))
        yield


@contextmanager
def _hooked(model: LoadedModel, site: Site, function: SiteFunction) -> Iterator[None]:
    point = model.adapter.hook_point(model.model, site)

    def on_input(_module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (function(args[0]), *args[1:])

    def on_output(_module: torch.nn.Module, _args: Any, output: Any) -> Any:
        return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)

    if point.side == "input":
        handle = point.module.register_forward_pre_hook(on_input)
    else:
        handle = point.module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()
