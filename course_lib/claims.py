"""What is said of Transformers, and what the chapters measured: the ledger of claims.

In a chapter:

    ledger = Ledger()
    ledger.settle("C04", as_said=error < 1e-5, measured={"largest difference": error})
    print(ledger)                               # C04  holds

`python -m course_lib.claims` reads what the stored notebooks show and writes it, claim by claim,
into notebooks/claims.json.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

HOLDS, WITHIN, NOT = "holds", "holds within limits", "does not hold as said"
MIME = "application/vnd.course.claim+json"
LEDGER = Path("notebooks/claims.json")  # from the course's folder


class Claim(NamedTuple):
    """What is commonly said, and the numbers of the chapters that measure it."""

    text: str
    chapters: tuple[int, ...]


CLAIMS: Mapping[str, Claim] = {
    "C01": Claim("Weights of a query sum to 1; the output is a weighted sum of the values", (2,)),
    "C02": Claim("Without 1/√d_k the scores spread, softmax saturates and gradients vanish", (2,)),
    "C03": Claim("Several heads capture different relations, better than one at equal size", (3,)),
    "C04": Claim("MultiHead = Concat(head_1 … head_h) W_O; one product does all heads", (3,)),
    "C05": Claim("Sinusoids: a code for each position, linear shifts, longer texts", (4,)),
    "C06": Claim("Without positions attention sees a bag: it is permutation-equivariant", (4,)),
    "C07": Claim("Relative positions do better than absolute ones", (4,)),
    "C08": Claim("Recurrence costs O(n·d²), attention O(n²·d); they cross where n ≈ d", (1,)),
    "C09": Claim("Distance O(n) against O(1); long dependencies are learned accordingly", (1,)),
    "C10": Claim("Sequential steps O(n) against O(1); so attention trains faster", (1,)),
    "C11": Claim("Gradients of a recurrent net vanish with distance; attention's do not", (1,)),
    "C12": Claim("Residuals keep gradients alive in depth and make the identity easy", (5,)),
    "C13": Claim("LayerNorm: mean 0, variance 1 for each token; steadier; place matters", (5,)),
    "C14": Claim("The −inf triangle hides the future exactly; all positions train at once", (6,)),
    "C15": Claim("Cross-attention: queries from the decoder, keys, values from the encoder", (7,)),
    "C16": Claim("Logits = output · W_out; the likeliest token is the prediction", (9,)),
    "C17": Claim("The cost of attention grows as n² in time and memory", (11,)),
    "C18": Claim("Longformer and BigBird keep quality at less cost; weak where all matters", (11,)),
    "C19": Claim("Linear attention φ(Q)(φ(K)ᵀV) is linear in n", (12,)),
    "C20": Claim("Performer approximates softmax attention by random features", (12,)),
    "C21": Claim("Linformer: attention is of low rank, n can be projected down to k", (12,)),
    "C22": Claim("Transformer-XL's memory of segments reaches further than its window", (13,)),
    "C23": Claim("The Compressive Transformer reaches further still for the same memory", (13,)),
    "C27": Claim("An encoder-decoder is not essential: a prompted decoder translates too", (10,)),
    "C28": Claim("Encoder and decoder are the same code but for the mask", (8, 9)),
    "C29": Claim("The decoder does m times the work: it reads its own output back", (9,)),
    "C30": Claim("An encoder cannot write a text in one pass: only factorising can", (10,)),
    "C31": Claim("A Transformer is an RNN with attention built in", (12,)),
    "C32": Claim("Masked Transformers with linear attention are exactly RNNs", (12,)),
    "C36": Claim("Bidirectional context resolves what left-to-right context cannot", (8,)),
    "C37": Claim("A block's output has its input's shape, so blocks stack", (5, 8)),
    "C38": Claim("Teacher forcing speeds training and costs exposure bias", (10,)),
}  # fmt: skip
"""The claims of the chapters that exist, by id."""


@dataclass(frozen=True)
class Finding:
    """A claim settled: its verdict and the numbers behind it.

    measured: {what, with its unit: values}, one value for each of `over` (seeds, as a rule).
    limits: where it holds and where not, in a sentence; empty if there is nothing to say.
    """

    claim: str
    verdict: str
    measured: Mapping[str, tuple[float, ...]]
    over: str
    limits: str

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: every measured quantity with its mean, spread and count."""
        return {
            "claim": self.claim,
            "text": CLAIMS[self.claim].text,
            "verdict": self.verdict,
            "measured": {name: _summary(values) for name, values in self.measured.items()},
            "over": self.over,
            "limits": self.limits,
        }

    def __str__(self) -> str:
        lines = [f"{self.claim}  {self.verdict}: {CLAIMS[self.claim].text}"]
        for name, values in self.measured.items():
            lines.append(f"     {name}: {shown(_summary(values), self.over)}")
        return "\n".join([*lines, f"     {self.limits}"] if self.limits else lines)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {"text/plain": str(self), MIME: self.to_dict()}


class Ledger:
    """What one chapter found. Printed: one line a claim, its id and verdict."""

    def __init__(self) -> None:
        self.findings: dict[str, Finding] = {}

    def settle(
        self,
        claim: str,
        *,
        as_said: bool,
        within_limits: bool = False,
        measured: Mapping[str, float | int | Sequence[float]],
        over: str = "seeds",
        limits: str = "",
    ) -> Finding:
        """Settle a claim by what was measured; show the result as the last value of a cell.

        Args:
            claim: its id, as in `CLAIMS`.
            as_said: whether it holds as it is said.
            within_limits: if not, whether it holds within limits.
            measured: {what, with its unit: number, or one number for each of `over`}.
            over: what the numbers of a quantity differ in: "seeds", "widths", …
            limits: where it holds and where not; needed for the verdict "holds within limits".

        Raises:
            ValueError: the claim is unknown, nothing was measured, a number is not finite, or
                limits are lacking.
        """
        if claim not in CLAIMS:
            raise ValueError(f"claim must be one of {', '.join(CLAIMS)}; got {claim!r}")
        verdict = HOLDS if as_said else WITHIN if within_limits else NOT
        if verdict == WITHIN and not limits:
            raise ValueError(f"limits must be given for {claim}: it holds within which?")
        values = {name: _as_tuple(name, value) for name, value in measured.items()}
        if not values:
            raise ValueError(f"measured is empty: what settles {claim}?")
        self.findings[claim] = Finding(claim, verdict, values, over, limits)
        return self.findings[claim]

    def __str__(self) -> str:
        return "\n".join(f"{id}  {self.findings[id].verdict}" for id in sorted(self.findings))


def _as_tuple(name: str, value: float | int | Sequence[float]) -> tuple[float, ...]:
    values = [value] if isinstance(value, int | float) else value
    numbers = tuple(float(v) for v in values)
    if not numbers or not all(-1e300 < v < 1e300 for v in numbers):
        raise ValueError(f"measured[{name!r}] must hold finite numbers, got {value!r}")
    return numbers


def _summary(values: Sequence[float]) -> dict[str, float]:
    """Mean and spread with four significant digits: more are noise."""
    numbers = {"mean": statistics.fmean(values), "least": min(values), "most": max(values)}
    return {**{k: float(f"{v:.4g}") for k, v in numbers.items()}, "count": len(values)}


def shown(summary: Mapping[str, float], over: str) -> str:
    """ "0.412 (0.38 … 0.45 over 5 seeds)", or the number alone where there is one."""
    if summary["count"] == 1:
        return f"{summary['mean']:.3g}"
    spread = f"{summary['least']:.3g} … {summary['most']:.3g}"
    return f"{summary['mean']:.3g} ({spread} over {summary['count']} {over})"


def collect(root: Path) -> dict[str, list[dict[str, Any]]]:
    """{claim: its findings} as the stored outputs of the notebooks show them.

    Each finding is `Finding.to_dict` with its chapter and the id of the cell that measured it.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((root / "notebooks").glob("[0-9]*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                finding = output.get("data", {}).get(MIME)
                if finding:
                    where = {"chapter": path.stem, "cell": cell["id"]}
                    found.setdefault(finding["claim"], []).append({**finding, **where})
    return dict(sorted(found.items()))


def text(root: Path) -> str:
    """The ledger as it stands in notebooks/claims.json."""
    return json.dumps(collect(root), indent=1, ensure_ascii=False) + "\n"


def write(root: Path) -> Path:
    """Write the ledger; return its path."""
    (root / LEDGER).write_text(text(root), encoding="utf-8")
    return root / LEDGER


if __name__ == "__main__":
    from .checkout import find_root

    print(f"wrote {write(find_root(Path.cwd()))}")
