"""Make report.png from the page of a report: its top with the first queries, and the section on similarities.

    python misc/report_picture.py logs/report/index.html misc/report.png

It needs playwright and Chromium.
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

QUERIES = 2  # shown at the top
WIDTH = 1280  # pixels

page, picture = sys.argv[1:]
with sync_playwright() as driver:
    browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    tab = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
    tab.goto(Path(page).absolute().as_uri())
    tab.evaluate("Promise.all(Array.from(document.images, i => { i.loading = 'eager'; return i.decode() }))")
    query, similarities, rates = (
        tab.locator(selector).bounding_box()
        for selector in (f".row >> nth={QUERIES - 1}", "#similarities", "#similarities ~ h3")
    )
    spans = [(0, query["y"] + query["height"]), (similarities["y"], rates["y"])]
    shots = [
        tab.screenshot(full_page=True, clip={"x": 0, "y": top, "width": WIDTH, "height": bottom - top})
        for top, bottom in spans
    ]
    browser.close()
images = [Image.open(io.BytesIO(shot), formats=["PNG"]).convert("RGB") for shot in shots]
canvas = Image.new("RGB", (WIDTH, sum(image.height for image in images)))
top = 0
for image in images:
    canvas.paste(image, (0, top))
    top += image.height
canvas.save(picture, optimize=True)
