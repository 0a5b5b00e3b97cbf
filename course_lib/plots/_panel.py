"""What both widgets share: a picture as PNG, shown where a live widget cannot be."""

from __future__ import annotations

import warnings
from base64 import b64encode
from io import BytesIO
from typing import Any

from course_lib.plots._extras import need

_DPI, _SHOWN_DPI = 160, 90  # pixels per inch in the file and on the page: the surplus is crispness


def to_png(figure: Any) -> bytes:
    """Render a matplotlib figure to PNG bytes, without a word on letters that the font lacks."""
    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def shown_width(png: bytes) -> int:
    """Width in CSS pixels at which a picture of `to_png` is shown (bytes 16 to 19 hold its own)."""
    return int.from_bytes(png[16:20], "big") * _SHOWN_DPI // _DPI


class Panel:
    """A live widget with a picture to fall back on.

    Displayed, it is ONE output in three forms: the live widget, its picture (PNG) and a sentence.
    Jupyter shows the first that it can; a code host or a printed page shows the picture.
    """

    widget: Any  # the ipywidgets box
    hint = "live widget: run this notebook in JupyterLab to use it"

    def picture(self) -> bytes:
        """The PNG on show now, empty if there is none."""
        raise NotImplementedError

    def show(self) -> None:
        """Display the widget below the running cell."""
        need("IPython.display").display(self)

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        data: dict[str, Any] = {"text/plain": f"<{type(self).__name__}: {self.hint}>"}
        metadata: dict[str, Any] = {}
        if png := self.picture():
            data["image/png"] = b64encode(png).decode()
            metadata["image/png"] = {"width": shown_width(png)}
        data.update(self.widget._repr_mimebundle_() or {}, **{"text/plain": data["text/plain"]})
        return data, metadata
