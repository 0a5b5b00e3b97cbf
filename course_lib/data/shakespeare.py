"""Shakespeare's plays, as plain text."""

from __future__ import annotations

import re

from course_lib.fetch import folder

_KEPT = r"A-Za-z \n!$&',\-.:;?"  # with those that occur: 63 symbols
_TWINS = str.maketrans({"‘": "'", "’": "'", "“": "'", "”": "'", "—": "-", "–": "-"})


def shakespeare() -> dict[str, str]:
    """The text of each of 38 plays by its name ("king-lear"), in alphabetical order.

    Speakers stand as "NAME:" before their lines; titles, stage directions and what is not a letter,
    a blank, a newline or one of !$&',-.:;? is left out. Fetch it once: `course fetch shakespeare`.

    Raises:
        NotFetchedError: it has not been fetched; names the command.
    """
    paths = sorted(folder("shakespeare").glob("*.md"))
    return {path.stem: _clean(path.read_text(encoding="utf-8")) for path in paths}


def _clean(markdown: str) -> str:
    paragraphs = []
    for paragraph in markdown.translate(_TWINS).split("\n\n"):
        paragraph = paragraph.strip()
        if paragraph.startswith("#") or re.fullmatch(r"_[^_]*_\.?", paragraph):
            continue  # a title, a stage direction
        paragraph = re.sub(r"\*\*(.+?)\*\*\.?", r"\1:", paragraph)
        paragraph = re.sub(r"_[^_]*_|\[[^\]]*\]", "", paragraph)
        paragraph = re.sub(rf"[^{_KEPT}]", "", paragraph)
        paragraph = re.sub(r" *\n *", "\n", re.sub(r" {2,}", " ", paragraph)).strip()
        if paragraph:
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs) + "\n"
