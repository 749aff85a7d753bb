"""One headless browser for all tests of the page."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

from moejax.viewing import Panel, page

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--window-size=1300,900",
)


def program(*names: str) -> str:
    found = next(filter(None, map(shutil.which, names)), None)
    assert found, f"no {names[0]} on PATH; apt-get install chromium chromium-driver"
    return found


class Browser:
    """A page in a real browser, and what it did."""

    def __init__(self, driver: webdriver.Chrome, folder: Path) -> None:
        self.driver, self.folder = driver, folder

    def open(self, name: str, *panels: Panel) -> None:
        """Write the page of these panels, and open it from disk."""
        path = self.folder / f"{name}.html"
        if not path.exists():
            path.write_text(page(panels, name), encoding="utf-8")
        self.driver.get(path.as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: str) -> None:
        WebDriverWait(self.driver, 5, 0.05).until(lambda _: self.run(f"return {condition}"))

    def click(self, selector: str) -> None:
        self.run("document.querySelector(arguments[0]).click()", selector)

    def point(self, selector: str) -> None:
        """Move the pointer over an element."""
        element = self.driver.find_element("css selector", selector)
        webdriver.ActionChains(self.driver).move_to_element(element).perform()

    def press(self, key: str) -> None:
        """A key where the focus is."""
        webdriver.ActionChains(self.driver).send_keys(key).perform()

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
        return self.run(script, selector)

    def classes(self, panel: int = 0) -> list[str]:
        """The classes of each token."""
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.className)"
        return self.run(script, f"#panels .p{panel} [data-t]")

    def loads(self, selector: str) -> list[float]:
        """The loads that the bars of an element stand for."""
        script = "return [...document.querySelectorAll(arguments[0])].map(e => +e.dataset.load)"
        return self.run(script, f"{selector} [data-load]")

    def seconds(self) -> float:
        """Processor time that the page's main thread has used."""
        metrics = self.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return {metric["name"]: metric["value"] for metric in metrics}["TaskDuration"]

    def errors(self) -> list[str]:
        """What the console has said since this was asked last."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses asked for since this was asked last."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [e for e in events if e["method"] == "Network.requestWillBeSent"]
        return [e["params"]["request"]["url"] for e in sent]


def start() -> webdriver.Chrome:
    options = Options()
    for flag in FLAGS:
        options.add_argument(flag)
    options.binary_location = program("chromium", "google-chrome")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(program("chromedriver")))
    driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    return driver


@pytest.fixture(scope="package")
def browser(tmp_path_factory) -> Iterator[Browser]:
    driver = start()
    yield Browser(driver, tmp_path_factory.mktemp("pages"))
    driver.quit()
