"""Draw the page of search.py serve with two photographs: one of a thing in the index, and one of a thing that is not.

    python misc/things.py photos
    mkdir new && mv photos/camera new && mv photos/mailbox/5.jpg new/mailbox.jpg
    python search.py index --backbone-only --model tf_efficientnet_lite0 --pretrained pypi --images photos \\
        --out things.index --calibrate
    python misc/page_picture.py things.index new/mailbox.jpg new/camera/2.jpg misc/page.jpg

It needs playwright, Chromium and Gradio.
"""

import io
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH, NEIGHBOURS = 900, 5

index, *photographs, picture = sys.argv[1:]
search = Path(__file__).resolve().parent.parent / "search.py"
command = [sys.executable, search, "serve", "--index", index, "--port", "0", "-k", str(NEIGHBOURS)]
with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as driver:
    try:
        url = re.search(r"http://\S+", server.stdout.readline())[0]
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": WIDTH, "height": 400}, color_scheme="light")
        tab.goto(url)
        tab.set_input_files("#photographs input[type=file]", photographs)
        tab.wait_for_selector(f".answer >> nth={len(photographs) - 1}")
        tab.wait_for_selector("#photographs button")  # empty again
        shot = tab.screenshot(full_page=True)
        browser.close()
    finally:
        server.send_signal(signal.SIGINT)
with Image.open(io.BytesIO(shot), formats=["PNG"]) as image:
    image.convert("RGB").save(picture, quality=88, optimize=True)
