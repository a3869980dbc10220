"""HTML pages of one file: marks that are filled in, lists of facts, and data for their scripts."""

import html
import json
import re
from collections.abc import Mapping
from typing import Any


def fill(page: str, parts: Mapping[str, str]) -> str:
    """A page with each {{name}} replaced, in one pass: what is filled in may hold a mark itself."""
    return re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], page)


def facts(told: Mapping[str, str]) -> str:
    """Names and texts as the items of a <dl>."""
    return "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in told.items())


def script_json(value: Any) -> str:
    """JSON that a script element can hold: nothing in it ends the element."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
