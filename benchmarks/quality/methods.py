"""Semantix, SCSA and their baselines on the same Paperland pairs."""

from collections.abc import Mapping, Sequence

from .. import report
from .part import Found

# Row: the part and variant that it is of. What every row is compared with comes first.
ROWS = {
    "AdaIN replay": ("semantix", "AdaIN replay"),
    "universal attention (StyleID)": ("scsa", "universal attention"),
    "Semantix": ("semantix", "full"),
    "Semantix, true maps": ("semantix", "full, true maps"),
    "SCSA, automatic maps": ("scsa", "automatic maps"),
    "SCSA, true maps": ("scsa", "SCSA"),
}
BASELINES = tuple(ROWS)[:2]
FIGURES = {"style": "style taken over", "structure": "structure kept", "score": "score"}


def table(found: Mapping[str, Sequence[Found]]) -> str:
    """The figures on the pairs that both parts have, from the first on, and the gain in score over the baselines."""
    pairs = min(len(found[part]) for part, _ in ROWS.values())
    of = {
        row: {f: [one["figures"][variant][f] for one in found[part][:pairs]] for f in FIGURES}
        for row, (part, variant) in ROWS.items()
    }
    rows = []
    for row, figures in of.items():
        cells = [report.with_error(report.mean_and_error(values)) for values in figures.values()]
        for baseline in BASELINES:
            gain = report.compared(figures["score"], of[baseline]["score"])
            cells += ["", "", ""] if row == baseline else report.won(gain)
        rows.append([row, *cells])
    ahead = [head for b in BASELINES for head in (f"ahead of {b.split(' (')[0]} by", "of pairs", "p")]
    return report.table([f"{pairs} pairs", *FIGURES.values(), *ahead], rows)
