"""The ledger of claims: what stands in it is what the notebooks' own outputs show."""

import json
import re
from pathlib import Path

import pytest

from course_lib import claims
from course_lib.claims import CLAIMS, Ledger
from course_lib.plots import CHAPTERS

ROOT = Path(__file__).resolve().parents[1]
STORED = json.loads((ROOT / claims.LEDGER).read_text(encoding="utf-8"))
READY = {chapter.number for chapter in CHAPTERS if chapter.ready}
each = pytest.mark.parametrize("claim", sorted(STORED))


def cells(stem):
    notebook = json.loads((ROOT / "notebooks" / f"{stem}.ipynb").read_text(encoding="utf-8"))
    return {cell["id"]: cell for cell in notebook["cells"] if cell["cell_type"] == "code"}


def test_the_ledger_is_what_the_notebooks_show():
    assert claims.text(ROOT) == (ROOT / claims.LEDGER).read_text(encoding="utf-8")


def test_every_claim_is_settled_in_each_of_its_chapters_that_exists():
    wanted = {id: sorted(READY.intersection(claim.chapters)) for id, claim in CLAIMS.items()}
    found = {id: [int(f["chapter"][:2]) for f in findings] for id, findings in STORED.items()}
    assert {id: numbers for id, numbers in wanted.items() if numbers} == found


@each
def test_a_claim_is_settled_by_numbers_with_their_spread(claim):
    for finding in STORED[claim]:
        assert finding["measured"]
        for summary in finding["measured"].values():
            assert summary["least"] <= summary["mean"] <= summary["most"]
            assert summary["count"] >= 1


@each
def test_the_cell_that_measured_it_settles_this_claim_and_asserts_nothing_by_hand(claim):
    for finding in STORED[claim]:
        source = "".join(cells(finding["chapter"])[finding["cell"]]["source"])
        assert re.search(rf'settle\(\s*"{claim}"', source)
        assert source.startswith("# NBVAL_IGNORE_OUTPUT")


@each
def test_the_verdict_stands_in_a_cell_that_nbval_compares(claim):
    for finding in STORED[claim]:
        line = f"{claim}  {finding['verdict']}"
        strict = [
            output.get("text", "")
            for cell in cells(finding["chapter"]).values()
            if "NBVAL_IGNORE_OUTPUT" not in "".join(cell["source"])
            for output in cell["outputs"]
        ]
        assert any(line in "".join(text).splitlines() for text in strict), line


# -- settling ----------------------------------------------------------------------------------


def test_a_verdict_follows_from_what_was_measured():
    ledger = Ledger()
    ledger.settle("C04", as_said=True, measured={"difference": 1e-7})
    ledger.settle("C01", as_said=False, within_limits=True, measured={"a": 1}, limits="Here.")
    ledger.settle("C03", as_said=False, measured={"a": [1.0, 3.0]})
    assert str(ledger).splitlines() == [
        "C01  holds within limits",
        "C03  does not hold as said",
        "C04  holds",
    ]


def test_a_finding_tells_mean_and_spread_over_the_seeds():
    found = Ledger().settle("C03", as_said=True, measured={"loss [nats]": [0.25, 0.5, 0.75]})
    assert "loss [nats]: 0.5 (0.25 … 0.75 over 3 seeds)" in str(found)
    assert found.to_dict()["measured"]["loss [nats]"] == {
        "mean": 0.5,
        "least": 0.25,
        "most": 0.75,
        "count": 3,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"claim": "C99"}, "claim must be one of C01.*got 'C99'"),
        ({"measured": {}}, "measured is empty"),
        ({"measured": {"x": []}}, r"measured\['x'\] must hold finite numbers"),
        ({"measured": {"x": [1.0, float("nan")]}}, "finite numbers"),
        ({"as_said": False, "within_limits": True}, "limits must be given for C03"),
    ],
)
def test_what_settles_nothing_is_refused(options, message):
    given = {"claim": "C03", "as_said": True, "measured": {"x": 1.0}} | options
    with pytest.raises(ValueError, match=message):
        Ledger().settle(given.pop("claim"), **given)
