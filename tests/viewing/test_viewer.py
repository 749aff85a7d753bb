"""The page in a browser: what it shows is what was traced, and it can be walked by keys."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.keys import Keys

from tests.viewing import made
from tests.viewing.conftest import Browser

PANEL = made.panel()
NONE, FREE = made.panel("none", collapsed=True), made.panel("free", seed=1)


@pytest.fixture
def one(browser: Browser) -> Browser:
    browser.open("one", PANEL)
    return browser


@pytest.fixture
def pair(browser: Browser) -> Browser:
    browser.open("pair", NONE, FREE)
    return browser


def wanted(panel, layer: int, rank: int = 0) -> list[str]:
    """Each token's classes, from the trace."""
    expert_T = panel.trace.expert_TLR[:, layer, rank].tolist()
    dropped_T = panel.trace.dropped_TLR[:, layer, rank].tolist()
    return [
        "t none" if expert == 4 else f"t e{expert}{' dropped' * lost}"
        for expert, lost in zip(expert_T, dropped_T, strict=True)
    ]


def test_it_opens_without_an_error_or_a_request(browser: Browser) -> None:
    browser.requests(), browser.errors()
    browser.open("one", PANEL)
    for step in range(1, 8):
        browser.press(str(step))
    assert browser.errors() == []
    assert [url for url in browser.requests() if not url.startswith("file:")] == []
    refused = browser.driver.execute_async_script(
        "const done = arguments[0];"
        "addEventListener('securitypolicyviolation', (e) => done(e.effectiveDirective));"
        "fetch('https://127.0.0.1:9/').catch(() => 0);"
    )
    assert refused == "connect-src"
    assert any("Content Security Policy" in error for error in browser.errors())


def test_tokens_have_the_colours_of_their_experts(one: Browser) -> None:
    assert one.classes() == wanted(PANEL, 0)
    one.press("]")
    assert one.classes() == wanted(PANEL, 1) and "Layer 3" in one.text("#layer-name")
    one.run("const s = document.getElementById('rank'); s.value = 1; s.onchange?.(); "
            "s.dispatchEvent(new Event('change'))")  # fmt: skip
    assert one.classes() == wanted(PANEL, 1, rank=1)
    colours = one.run("""
        const colour = (e) => getComputedStyle(e).backgroundColor;
        return [...document.querySelectorAll('#panels [data-t]')].map((span) => {
          const e = /e(\\d+)/.exec(span.className)[1];
          return [e, colour(span), colour(document.querySelector(`#load-bars .e${e} .kept`))];
        });""")
    assert all(token == bar for _, token, bar in colours)
    assert len({expert for expert, *_ in colours}) == len({token for _, token, _ in colours}) == 4


def test_the_text_is_the_text(one: Browser) -> None:
    shown = "".join(one.texts("#panels [data-t]"))
    assert shown.replace("↵", "").replace("⇥", "").replace("∙", "") == made.TEXT[:-1]


def told(panel, t: int, layer: int) -> list[str]:
    """A token's choices as the card has them."""
    trace = panel.trace
    return [
        f"expert {expert}{weight:.3f}{'dropped' * int(lost)}"
        for expert, weight, lost in zip(
            trace.expert_TLR[t, layer].tolist(),
            trace.weight_TLR[t, layer].astype(np.float16).tolist(),
            trace.dropped_TLR[t, layer],
            strict=True,
        )
        if expert < 4
    ]


def test_hover_and_focus_tell_the_weights(one: Browser) -> None:
    one.point('#panels [data-t="2"]')
    assert one.texts("#card .choices li") == told(PANEL, 2, 0)
    assert one.texts("#card .choices li")[0].endswith("dropped")
    one.click('[data-t="7"]')
    assert one.texts("#card .choices li") == told(PANEL, 7, 0)
    one.click('[data-t="3"]')
    assert "No expert" in one.text("#card") and "no expert" in one.text("#live")


def test_keys_walk_through_tokens_layers_and_steps(one: Browser) -> None:
    one.run("document.querySelector('[data-t=\"24\"]').focus()")
    for key, token in ((Keys.ARROW_RIGHT, 25), (Keys.ARROW_LEFT, 24), (Keys.HOME, 0),
                       (Keys.ARROW_LEFT, 0), (Keys.END, 65), (Keys.ARROW_LEFT, 64)):  # fmt: skip
        one.press(key)
        assert one.run("return Number(document.activeElement.dataset.t)") == token
        assert one.run("return document.querySelectorAll('[data-t][tabindex=\"0\"]').length") == 1
    one.press(Keys.ARROW_UP)
    expert, weight = PANEL.trace.expert_TLR[64, 1, 0], PANEL.trace.weight_TLR[64, 1, 0]
    assert f"token 65, layer 3. expert {expert} weight {weight:.2f}" in one.text("#live")
    one.press("5")
    assert one.text('[data-step][aria-pressed="true"]') == "5Dispatch"
    one.press(Keys.ARROW_DOWN)
    assert "Layer 1" in one.text("#layer-name")


def test_each_step_shows_its_numbers(one: Browser) -> None:
    t, scores_E = 7, PANEL.trace.scores_TLE[7, 0].astype(np.float32)
    first, second = PANEL.trace.expert_TLR[t, 0].tolist()
    one.click(f'[data-t="{t}"]')
    one.press("3")
    np.testing.assert_allclose(
        [float(x) for x in one.texts("#stage .value")], scores_E, atol=0.0151
    )
    one.press("4")
    assert one.texts("#stage .bar:not(.hollow) .label") == sorted(map(str, (first, second)))
    one.press("5")
    buffer = [row for row in range(66) if first in PANEL.trace.expert_TLR[row, 0]]
    place = f"number {buffer.index(t) + 1} of the {len(buffer)} tokens"
    assert place in one.text(f"#stage .buffer.e{first}")
    assert one.texts("#stage .here") == [one.texts("#panels [data-t]")[t]] * 2
    one.press("6")
    assert one.texts("#stage .busy") == sorted(map(str, (first, second)))
    one.press("7")
    weights = PANEL.trace.weight_TLR[t, 0].astype(np.float16)
    assert one.text("#stage .sum") == (
        f"y = {weights[0]:.3f} · E{first}(x) + {weights[1]:.3f} · E{second}(x)"
    )


def test_a_dropped_choice_is_struck_through(one: Browser) -> None:
    one.click('[data-t="2"]')
    one.press("5")
    assert one.texts("#stage .here s") == ["␣"] and made.TEXT[2] == " "
    one.press("7")
    assert len(one.texts("#stage .sum s")) == 1
    assert one.texts("#stage .weights span") == [str(PANEL.trace.expert_TLR[2, 0, 1])]


def test_loads_are_counted_and_select_an_expert(one: Browser) -> None:
    counts = np.bincount(PANEL.trace.expert_TLR[:, 0].ravel(), minlength=5)[:4]
    script = (
        "return [...document.querySelectorAll('#load-bars [data-load]')].map(e => +e.dataset.load)"
    )
    assert one.run(script) == counts.tolist()
    one.click('#load-bars [data-e="1"]')
    chosen_T = (PANEL.trace.expert_TLR[:, 0] == 1).any(-1)
    hit = ["t e1 hit" if chosen else "t away" for chosen in chosen_T]
    hit[2] = hit[2].replace("e1", "e1 dropped" if PANEL.trace.expert_TLR[2, 0, 0] == 1 else "e1")
    assert one.classes() == hit
    one.press(Keys.ESCAPE)
    assert one.classes() == wanted(PANEL, 0)


def test_the_slider_shows_collapse_beside_balance(pair: Browser) -> None:
    for moment, collapsed in ((0, [1, 1, 1, 1]), (2, [0.5, 2.5, 0.5, 0.5]), (4, [0, 4, 0, 0])):
        pair.run("const s = document.getElementById('moment'); s.value = arguments[0];"
                 "s.dispatchEvent(new Event('input'))", moment)  # fmt: skip
        assert pair.loads("#moments .p0") == collapsed
        assert pair.loads("#moments .p1") == [1, 1, 1, 1]
        assert pair.text("#moment-name") == f"Step {10 * moment + 10}"
    assert "MaxVio 3.00" in pair.text("#moments .p0 .told")
    assert "3 of 4 have less than a tenth" in pair.text("#moments .p0 .told")


def test_two_runs_stand_side_by_side(pair: Browser) -> None:
    assert pair.classes(0) == wanted(NONE, 0) and pair.classes(1) == wanted(FREE, 0)
    left, right = pair.run("""
        return [...document.querySelectorAll('#panels .lines')]
          .map((e) => e.getBoundingClientRect());""")
    assert left["top"] == right["top"] and left["right"] <= right["left"]
    pair.click('[data-t="9"]')
    assert pair.texts("#card .choices li") == told(NONE, 9, 0) + told(FREE, 9, 0)
    pair.click('#load-bars .p1 [data-e="2"]')  # the other run's expert 2 is another one
    assert "hit" not in " ".join(pair.classes(0)) and "hit" in " ".join(pair.classes(1))


def test_two_checkpoints_of_one_run_are_compared(browser: Browser) -> None:
    browser.open("paired", PANEL, made.panel(step=120, seed=1))
    same = np.mean(PANEL.trace.expert_TLR[:, 0, 0] == FREE.trace.expert_TLR[:, 0, 0])
    assert f"{100 * same:.0f} % of the tokens go to the same expert" in browser.text("#legend")
    browser.click('#load-bars .p1 [data-e="2"]')
    assert "hit" in " ".join(browser.classes(0)) and "hit" in " ".join(browser.classes(1))
    assert len(browser.texts("#moments .model")) == 1


def test_a_run_that_recorded_no_loads_says_so(browser: Browser) -> None:
    browser.errors()
    browser.open("silent", dataclasses.replace(PANEL, history=None))
    assert "No loads were recorded" in browser.text("#training")
    assert browser.errors() == []


def test_an_address_opens_where_it_was_left(browser: Browser) -> None:
    browser.open("one", PANEL)
    browser.run("location.hash = 'layer=1&token=9&step=6&rank=1&expert=99'")
    browser.wait("document.querySelector('[data-t=\"9\"]').tabIndex === 0")
    assert browser.classes() == wanted(PANEL, 1, rank=1)  # there is no expert 99
    assert browser.text('[data-step][aria-pressed="true"]') == "6Experts"
    browser.press("[")
    browser.wait("location.hash === '#rank=1&token=9&step=6'")


def pixels(browser: Browser) -> np.ndarray:
    png = browser.driver.get_screenshot_as_png()
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.int32)


def test_light_and_dark_are_seen(browser: Browser) -> None:
    browser.open("many", made.panel(experts=64, tokens=300))
    for theme, background in (("light", 255), ("dark", 21)):
        browser.click("#theme")
        assert theme in browser.text("#theme")
        image = pixels(browser)
        assert abs(np.median(image) - background) < 8
        colourful = np.ptp(image, axis=-1) > 40
        hues = np.unique(image[colourful] // 16, axis=0)
        assert colourful.mean() > 0.02 and len(hues) > 20, theme
        contrast = browser.run(CONTRAST)
        assert len(contrast) == 64 and min(contrast) > 4.5, (theme, min(contrast))


# WCAG contrast of ink on each expert's colour, as the browser paints both.
CONTRAST = """
    const pen = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const luminance = (colour) => {
      pen.fillStyle = colour;
      pen.fillRect(0, 0, 1, 1);
      const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
        .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ink = luminance(getComputedStyle(document.body).color);
    return [...document.querySelectorAll('#load-bars .kept')].map((bar) => {
      const paper = luminance(getComputedStyle(bar).backgroundColor);
      return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    });
"""


def test_a_phone_and_a_zoomed_page_need_no_scrolling_sideways(pair: Browser) -> None:
    for width in (360, 650):  # a phone; half of 1300, as 200 % zoom lays out
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        pair.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        for step in "234567":
            pair.press(step)
            assert pair.run("return document.documentElement.scrollWidth") <= width
    pair.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_every_control_has_a_name(pair: Browser) -> None:
    nameless = pair.run("""
        return [...document.querySelectorAll('button, input, select, canvas, [role=listbox]')]
          .filter((e) => !(e.ariaLabel || e.textContent.trim() || e.labels?.length))
          .map((e) => e.outerHTML);""")
    assert nameless == []


LAYER_CHANGES = """
    const done = arguments[0];
    let left = 10;
    const go = () => {
      document.getElementById('higher').click();
      if (--left) requestAnimationFrame(() => setTimeout(go));
      else requestAnimationFrame(() => setTimeout(done));
    };
    go();
"""


def test_a_large_text_changes_layers_at_once(browser: Browser) -> None:
    """2,000 tokens x 32 layers x 64 experts. Seconds of the page's thread, from scripts to paint:
    on two cores that others keep busy a change took 0.034."""
    browser.open("large", made.panel(tokens=2000, layers=32, experts=64, k=4))
    began = browser.seconds()
    browser.driver.execute_async_script(LAYER_CHANGES)
    assert "Layer 21" in browser.text("#layer-name")
    assert 0 < (browser.seconds() - began) / 10 < 0.1
