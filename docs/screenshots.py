"""Makes the README's pictures of a dashboard that runs.

python -m launch.dashboard --workdir=runs/tiny &
python docs/screenshots.py http://127.0.0.1:8642
"""

import pathlib
import shutil
import sys

from playwright import sync_api

# Address, file, height of the window.
_PICTURES = (
    ("/", "dashboard.png", 1480),
    ("/program/best", "program.png", 1200),
)
_WIDTH = 1100


def main(address: str):
  here = pathlib.Path(__file__).parent
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(
        executable_path=shutil.which("chromium"), args=["--no-sandbox"]
    )
    for path, name, height in _PICTURES:
      page = browser.new_page(
          viewport={"width": _WIDTH, "height": height}, color_scheme="light"
      )
      page.goto(f"{address}{path}")
      page.screenshot(path=here / name)
    browser.close()


if __name__ == "__main__":
  main(sys.argv[1].rstrip("/"))
