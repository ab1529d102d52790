"""Hook of mkdocs that renders formulas as MathML, so that pages need neither JavaScript nor a network."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# As pymdownx.arithmatex writes them in its generic mode.
_FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Return a page's HTML with its formulas as MathML."""
    return _FORMULA.sub(_render, content)


def _render(match: re.Match[str]) -> str:
    return convert(html.unescape(match["latex"]), display="block" if match["tag"] == "div" else "inline")
