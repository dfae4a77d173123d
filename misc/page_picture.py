"""Draw the page of search.py serve with two photographs: one of a thing in the index, and one of a thing that is not.

    python misc/things.py photos
    mkdir new && mv photos/camera new && mv photos/mailbox/5.jpg new/mailbox.jpg
    python search.py index --backbone-only --model tf_efficientnet_lite0 --pretrained pypi --images photos \\
        --out things.index --calibrate
    python misc/page_picture.py things.index new/mailbox.jpg new/camera/2.jpg misc/page.jpg

It needs playwright, Chromium and Gradio.
"""

import argparse
import io
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

SEARCH = Path(__file__).resolve().parent.parent / "search.py"
WIDTH, NEIGHBOURS = 900, 5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", help="folder that search.py index wrote")
    parser.add_argument("photographs", nargs="+", help="image to drop on the page")
    parser.add_argument("picture", help="file to write, e.g. page.jpg")
    args = parser.parse_args()
    command = [sys.executable, SEARCH, "serve", "--index", args.index, "--port", "0", "-k", str(NEIGHBOURS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as driver:
        try:
            if not (line := server.stdout.readline()):
                sys.exit(1)  # search.py has said why
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": WIDTH, "height": 400}, color_scheme="light")
            tab.goto(re.search(r"http://\S+", line)[0])
            tab.set_input_files("#photographs input[type=file]", args.photographs)
            tab.wait_for_selector(f".answer >> nth={len(args.photographs) - 1}")
            tab.wait_for_selector("#photographs button")  # empty again
            shot = tab.screenshot(full_page=True)
            browser.close()
        finally:
            server.send_signal(signal.SIGINT)
    with Image.open(io.BytesIO(shot), formats=["PNG"]) as image:
        image.convert("RGB").save(args.picture, quality=88, optimize=True)


if __name__ == "__main__":
    main()
