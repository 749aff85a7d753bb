"""The page as one file: the template with its style sheet, its scripts and the data put in.

It may run these scripts and nothing else: a content security policy names them by their hashes and
forbids every request.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path

from moejax.viewing.packing import pack
from moejax.viewing.panel import Panel

TEMPLATE = Path(__file__).parent / "template"
# They share one scope; each uses those before it.
SCRIPTS = (
    "decode",
    "model",
    "store",
    "elements",
    "colours",
    "text",
    "token",
    "loads",
    "stages",
    "steps",
    "training",
    "active",
    "controls",
    "keys",
    "head",
    "address",
)


def page(panels: Sequence[Panel], title: str) -> str:
    """The HTML of one model, or of two side by side.

    Raises:
      ValueError: what `pack` raises.
    """
    style = (TEMPLATE / "viewer.css").read_text(encoding="utf-8")
    script = "\n".join(
        ['"use strict";', "{", *(_script(name) for name in SCRIPTS), "}"],
    )
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    # In a script element only < could end it.
    data = json.dumps(pack(panels), ensure_ascii=False, separators=(",", ":"))
    parts = {
        "policy": policy,
        "title": html.escape(title),
        "style": style,
        "script": script,
        "data": data.replace("<", "\\u003c"),
    }
    template = (TEMPLATE / "viewer.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _script(name: str) -> str:
    return (TEMPLATE / f"{name}.js").read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
