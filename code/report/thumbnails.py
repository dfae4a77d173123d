"""Small pictures of images in a page of HTML, which needs no other file for them."""

import base64
import html
import io
from collections.abc import Callable

from PIL import Image

from proxy_anchor.files import printable

Thumbnail = Callable[[str, int], Image.Image]  # (path, size) -> a small RGB image; OSError or ValueError without one


def data_uri(path: str, size: int, thumbnail: Thumbnail) -> str:
    """A thumbnail as a data URI, "" if the file is gone or damaged."""
    try:
        image = thumbnail(path, size)
    except (OSError, ValueError):
        return ""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def figure(picture: str, caption: str, path: str, kind: str = "") -> str:
    """A picture, a data URI or "" without one, with its caption as HTML; kind: its class."""
    title = html.escape(printable(path))
    image = f'<img src="{picture}" alt="{title}">' if picture else '<div class="missing">missing or damaged</div>'
    return f'<figure class="{kind}" title="{title}">{image}<figcaption>{html.escape(caption)}</figcaption></figure>'
