"""Take report.png from the page of a report: its worst queries, the recall of its classes and the hardest of them.

    python misc/report_picture.py logs/report/index.html misc/report.png

It needs playwright and Chromium.
"""

import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

page, picture = sys.argv[1:]
with sync_playwright() as driver:
    browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    tab = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    tab.goto(Path(page).absolute().as_uri())
    tab.evaluate("Promise.all(Array.from(document.images, i => { i.loading = 'eager'; return i.decode() }))")
    top = tab.locator("#worst").bounding_box()["y"] - 12
    last = tab.locator(".pair").first.bounding_box()
    clip = {"x": 0, "y": top, "width": 1280, "height": last["y"] + last["height"] + 12 - top}
    tab.screenshot(path=picture, full_page=True, clip=clip)
    browser.close()
Image.open(picture, formats=["PNG"]).convert("RGB").save(picture, optimize=True)
