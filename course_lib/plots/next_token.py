"""What a language model would write next, and what temperature, top-k and top-p leave of it."""

from __future__ import annotations

from html import escape
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from course_lib.plots._extras import need
from course_lib.plots._panel import Panel, shown_width, to_png
from course_lib.plots.style import COLORS, rc_params
from course_lib.plots.widgets import _WARNING, _paper, _said

if TYPE_CHECKING:  # importing plots need not wait for torch
    from course_lib import data


class NextToken(Panel):
    """Type a prompt and move the three controls: the next token's probabilities, and a text.

    Bars are drawn for the likeliest tokens. A full bar may be drawn from; a pale one is cut.

    Args:
        model: tokens (batch, n) -> logits (batch, n, vocab), as `models.Decoder`.
        tokenizer: between text and tokens.
        prompt: what stands in the line at first.
        length: tokens that the text below goes on for.
        bars: how many tokens are drawn.
        seed: of the text below; the same controls give the same text.

    Attributes:
        text, temperature, top_k, top_p: the controls; set their `.value`.
        before: (vocab,), the probabilities at this temperature, nothing cut.
        after: (vocab,), the probabilities that are drawn from; 0 for what is cut.
        continuation: the text that follows the prompt.
        message: what is wrong with the prompt, "" if nothing is.
        error: what was raised for this prompt, or None.

    Raises:
        ValueError: bars is below 1.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: data.CharTokenizer,
        prompt: str,
        *,
        length: int = 60,
        bars: int = 16,
        seed: int = 0,
    ) -> None:
        if bars < 1:
            raise ValueError(f"bars must be at least 1, got {bars}")
        vocab = tokenizer.vocab_size
        self._model, self._tokenizer, self._length, self._seed = model, tokenizer, length, seed
        self._bars = min(bars, vocab)
        self.before = self.after = np.zeros(vocab)
        self.continuation, self.message, self._png = "", "", b""
        self.error: Exception | None = None
        self._add_controls(prompt, vocab)
        self._ask()

    def _add_controls(self, prompt: str, vocab: int) -> None:
        w = need("ipywidgets")
        style = {"description_width": "90px"}  # "temperature" in full
        wide = {"continuous_update": False, "layout": w.Layout(width="420px"), "style": style}
        self.text = w.Text(value=prompt, description="prompt", **wide)
        self.temperature = w.FloatSlider(1.0, min=0.0, max=2.0, step=0.1, **wide)
        self.top_k = w.IntSlider(vocab, min=1, max=vocab, **wide)
        self.top_p = w.FloatSlider(1.0, min=0.05, max=1.0, step=0.05, **wide)
        for name in ("temperature", "top_k", "top_p"):
            getattr(self, name).description = name.replace("_", "-")
        self._image, self._line = w.Image(format="png"), w.HTML()
        controls = [self.text, self.temperature, self.top_k, self.top_p]
        self.widget = w.VBox([*controls, self._image, self._line])
        self.widget.add_class("next-token")  # a name by which a page can find it
        for control in controls:
            control.observe(lambda _: self._ask(), names="value")

    def picture(self) -> bytes:
        """The bars as PNG, the text above them; empty while a message stands in their place."""
        return b"" if self.error else self._png

    def _ask(self) -> None:
        """Put the prompt to the model, cut its answer, write on, and show all of it."""
        self.error, self.message = None, ""
        try:
            self._compute(self.text.value)
            self._png = self._draw()
            self._image.value = self._png
            self._image.layout.width = f"{shown_width(self._png)}px"
            self._line.value = _written(self.text.value, self.continuation)
        except Exception as error:  # a prompt may be too long or hold unknown symbols: say it
            self.error, self.message, self.continuation = error, _said(error), ""
            self._line.value = _paper(self.message, _WARNING)
        # an old picture beside a new prompt would be a lie
        self._image.layout.display = "none" if self.error else None

    def _compute(self, prompt: str) -> None:
        import torch

        from course_lib import generation

        if not prompt:
            raise ValueError("The prompt is empty: type at least one character.")
        tokens = self._tokenizer.encode(prompt)
        training = self._model.training
        self._model.eval()
        with torch.no_grad():
            logits = self._model(tokens[None])[:, -1]  # (1, n, vocab) -> (1, vocab)
        self._model.train(training)
        options = {"temperature": self.temperature.value, "top_p": self.top_p.value}
        options["top_k"] = self.top_k.value
        if self.temperature.value == 0:  # greedy: all weight on one
            self.before = logits.softmax(-1)[0].numpy()
            self.after = np.eye(len(self.before))[self.before.argmax()]
        else:
            self.before = generation.shares(logits, temperature=self.temperature.value)[0].numpy()
            self.after = generation.shares(logits, **options)[0].numpy()
        g = torch.Generator().manual_seed(self._seed)
        text = generation.generate(self._model, tokens, self._length, generator=g, **options)
        self.continuation = self._tokenizer.decode(text[len(tokens) :])

    def _draw(self) -> bytes:
        order = np.argsort(-self.before, kind="stable")[: self._bars]
        with need("matplotlib").rc_context(rc_params()):
            figure = need("matplotlib.figure").Figure(figsize=(7.4, 3.7))
            ax = figure.subplots()
            draw_shares(ax, self.before, self.after, self._tokenizer.symbols, order)
            kept = int((self.after > 0).sum())
            ax.set_title(f"…{_seen(self.text.value[-24:])} ▸ ?   {kept} of {len(self.after)} kept")
            wrote = fill(_seen(self.continuation), 78)  # for where the live line cannot be shown
            style = {"transform": ax.transAxes, "va": "top", "family": "monospace", "fontsize": 9}
            ax.text(0, -0.27, f"it writes:\n{wrote}", **style)
            return to_png(figure)


def draw_shares(ax: Any, before: Any, after: Any, symbols: str, order: Any) -> None:
    """Bars of probabilities: `before` pale, `after` (0 where cut) full, for the tokens in `order`.

    before, after: (vocab,), each summing to 1. symbols: the tokens' names. order: indices to draw.
    """
    before, after, places = np.asarray(before)[order], np.asarray(after)[order], range(len(order))
    ax.bar(places, before, color=COLORS["sky"], alpha=0.35, width=0.85, label="cut")
    kept = np.where(after > 0, before, 0)
    ax.bar(places, kept, color=COLORS["blue"], width=0.85, label="kept")
    ax.plot(
        np.flatnonzero(after > 0), after[after > 0], "_", color=COLORS["vermillion"],
        ms=11, mew=2.0, label="drawn with",
    )  # fmt: skip
    ax.set_xticks(places, [_seen(symbols[i]) for i in order], family="monospace")
    ax.set(xlabel="next token, likeliest first", ylabel="probability")
    ax.grid(False, axis="x")


def _seen(text: str) -> str:
    """Blanks and line ends as signs that can be seen."""
    return text.replace(" ", "␣").replace("\n", "⏎")


def _written(prompt: str, continuation: str) -> str:
    """The prompt pale, what the model wrote after it dark."""
    return (
        f"<pre style='background:white;color:{COLORS['ink']};padding:6px 8px;white-space:pre-wrap'>"
        f"<span style='color:{COLORS['grey']}'>{escape(prompt)}</span>{escape(continuation)}</pre>"
    )
