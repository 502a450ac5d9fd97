"""The shell of the lab's pages: escaping, embedded data, figures."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from steerserve.lab.html import _json, svg

HOSTILE = "</script><img src=x onerror=alert(1)>&\u2028'\""


class Balanced(HTMLParser):
    """Fails on a tag that closes none or another than the open one."""

    VOID = frozenset({"meta", "br", "input", "img", "link", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def drawing() -> Figure:
    figure = Figure(figsize=(3, 2))
    axes = figure.subplots()
    axes.plot([1, 2], [3, 4], label="a < b")
    axes.legend()
    return figure


def test_embedded_json_is_the_data_and_ends_no_script() -> None:
    text = _json({"text": HOSTILE, "number": 1.5})
    assert json.loads(text) == {"text": HOSTILE, "number": 1.5}
    assert not set(text) & set("<>&\u2028")
    with pytest.raises(ValueError, match="not JSON compliant"):
        _json(float("nan"))


def test_a_figure_is_one_closed_svg_that_refers_to_nothing_outside() -> None:
    text = svg(drawing())
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert text.startswith("<svg")
    assert "a &lt; b" in text
    assert "currentColor" in text
    assert not re.search(r"https?:|<style|#000000|font-family", text)
    assert svg(drawing()) == text
