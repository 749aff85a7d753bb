"""The file: complete, closed to the network, and safe with any text."""

import base64
import hashlib
import json
import re

import pytest

from moejax.viewing import page
from moejax.viewing.page import SCRIPTS, TEMPLATE
from moejax.viewing.pieces import pieces
from tests.viewing import made


@pytest.fixture(scope="module")
def html() -> str:
    return page([made.panel(run="</script><b>{{style}}")], 'a "title" & <more>')


def element(html: str, tag: str) -> str:
    return re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)[-1]


def test_everything_was_put_in_and_every_script_is_used(html: str) -> None:
    assert not re.search(r"\{\{(?!style)", html)  # the run's name alone looks like a place
    assert "<title>a &quot;title&quot; &amp; &lt;more&gt;</title>" in html
    assert {path.stem for path in TEMPLATE.glob("*.js")} == set(SCRIPTS)


def test_the_policy_allows_this_style_and_this_script_and_no_request(html: str) -> None:
    policy = re.search(r'Security-Policy" content="(.*?)"', html)[1]
    for tag in ("style", "script"):
        digest = hashlib.sha256(element(html, tag).encode()).digest()
        assert f"'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    assert not re.search(r"https?://|@import|url\(", html.replace("http-equiv", ""))


def test_text_cannot_end_the_data(html: str) -> None:
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.S)[1]
    packed = json.loads(data)
    assert "".join(packed["text"]["piece"]) == made.TEXT[:-1] and "<" not in data
    assert packed["panels"][0]["title"] == "</script><b>{{style}}, step 240"


def test_a_character_of_several_tokens_stands_at_its_last_one() -> None:
    ids = list("aé😀b".encode())
    assert pieces(made.decode, made.np.array(ids), made.np.zeros(8)) == [
        "a", "", "é", "", "", "", "😀", "b",
    ]  # fmt: skip


def test_half_a_character_at_the_end_of_a_document_stays_there() -> None:
    ids = made.np.array([0xC3, ord("x"), 0xA9])
    assert pieces(made.decode, ids, made.np.array([0, 1, 1])) == ["\ufffd", "x", "\ufffd"]
