"""Self-contained HTML pages: a template, its data and its figures in one file that needs no network.

Templates extend ``base.html.j2``, which brings the look, and are filled with every value escaped.
"""

from __future__ import annotations

import io
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure


def render(template: str, **context: Any) -> str:
    """The page of ``templates/<template>.html.j2``.

    What the template prints is escaped unless it is ``Markup``; its filter ``json`` embeds data in a script.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("steerserve.lab"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["json"] = _json
    return environment.get_template(f"{template}.html.j2").render(context)


def svg(figure: Figure) -> Markup:
    """``figure`` as an inline ``<svg>`` in the page's font: transparent, its black in the colour of the page's text.

    Equal figures give equal bytes. Make it with ``matplotlib.figure.Figure``, which nobody has to close.
    """
    import matplotlib
    from markupsafe import Markup

    for axes in figure.axes:
        if (legend := axes.get_legend()) is not None:
            legend.set_frame_on(False)  # it is white
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "steerserve"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, bbox_inches="tight", metadata=nothing)
    drawing = stream.getvalue().partition("<svg")[2]
    drawing = re.sub(r' xmlns(:xlink)?="[^"]*"', "", drawing)
    drawing = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", drawing, flags=re.DOTALL)  # it would style the page
    drawing = re.sub(r"font-family: [^;]*; ", "", drawing)
    drawing = re.sub(r'<g id="[^"]*">', "<g>", drawing)  # the same in every figure of a page
    return Markup("<svg" + drawing.replace("#000000", "currentColor"))


def _json(data: Any) -> Markup:
    """``data`` as compact JSON that no HTML parser mistakes for the end of the script around it."""
    from markupsafe import Markup

    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
