"""The pictures of experiments/results/viewer: python -m tests.viewing.pictures VIEW.html"""

import sys
import time
from pathlib import Path

from tests.viewing.conftest import start

FOLDER = Path(__file__).parents[2] / "experiments/results/viewer"
PLACES = {
    "text": "#layer=1&theme=light",
    "steps": "#layer=1&step=4&theme=dark&at=steps",
}


def main(page: str) -> None:
    driver = start()
    driver.set_window_size(1300, 1120)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, place in PLACES.items():
        driver.get("about:blank")  # so that the next one is read anew
        driver.get(Path(page).absolute().as_uri() + place)
        time.sleep(1)  # for the last paint
        driver.save_screenshot(str(FOLDER / f"{name}.png"))
    driver.quit()


if __name__ == "__main__":
    main(sys.argv[1])
