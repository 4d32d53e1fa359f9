"""Audit -> a folder: tables, counts, and audit.html with the findings in numbers first and the images behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from seewhy.core.files import csv_text, write_json
from seewhy.curation.audit import Audit
from seewhy.curation.label_issues import ISSUE_LOG_ODDS
from seewhy.errors import OutputError
from seewhy.reports.figures import leak_figure
from seewhy.reports.html import data_url, render_page, thumbnail_url

EACH = 8  # examples of a gallery of pairs
SHOWN = 24  # label issues shown
ODD = 6  # images an issue


def save_audit(audit: Audit, folder: Path) -> list[Path]:
    """Writes pairs.csv, groups.csv, labels.csv, confusions.csv, image_issues.csv, audit.html and audit.json; the files written."""
    tables = {
        "pairs.csv": audit.pairs_table(),
        "groups.csv": audit.groups_table(),
        "labels.csv": audit.labels_table(),
        "confusions.csv": audit.confusions_table(),
        "image_issues.csv": audit.image_issues,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            (folder / name).write_text(csv_text(table), encoding="utf-8")
        (folder / "audit.html").write_text(audit_page(audit), encoding="utf-8")
        write_json(folder / "audit.json", audit.summary())
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); choose another place with --out") from error
    return [folder / name for name in (*tables, "audit.html", "audit.json")]


def audit_page(audit: Audit) -> str:
    """The page as text; images are inside it, a few hundred thumbnails at most."""
    leak = audit.leak
    facts = {
        "name": audit.images.name,
        "summary": audit.summary(),
        "pairs": [(title, text, [_pair(audit, n) for n in chosen]) for title, text, chosen in _pair_galleries(audit) if len(chosen)],
        "label_issues": [
            _label_issue(audit, place)
            for place in range(min(SHOWN, len(audit.images)))
            if audit.label_issues.log_odds[place] < ISSUE_LOG_ODDS
        ],
        "confusions": audit.confusions_table().head(12).to_dict("records"),
        "image_issues": [
            (issue, len(rows), [_odd(path) for path in rows["path"][:ODD]]) for issue, rows in audit.image_issues.groupby("issue")
        ],
        "leak": {theme: data_url(leak_figure(leak.plain, leak.grouped, theme), "png") for theme in ("light", "dark")} if leak else None,
    }
    return render_page("audit.html", facts)


def _pair_galleries(audit: Audit) -> list[tuple[str, str, npt.NDArray[np.int64]]]:
    """(title, what it shows, places of pairs): across labels, then each kind at its limit, where it is least sure."""
    near = audit.near
    by_hash = np.flatnonzero(near.kinds == "hash")
    by_features = np.flatnonzero(near.kinds == "features")
    crossing = np.flatnonzero(audit.across)
    return [
        ("Near-duplicates under different labels", "One of the two labels is likely wrong, or the classes overlap.", crossing[:EACH]),
        ("Equal files", "The same bytes under two names.", np.flatnonzero(near.kinds == "exact")[:EACH]),
        (
            "Nearly equal to the eye",
            "By their perceptual hashes; here the pairs that differ most, at the limit of what counts.",
            by_hash[np.lexsort((near.cosines[by_hash], -near.distances[by_hash]))][:EACH],
        ),
        (
            "Nearly equal to a network",
            "By the cosine of their features; here the pairs at the limit of what counts.",
            by_features[np.argsort(near.cosines[by_features], kind="stable")][:EACH],
        ),
    ]


def _pair(audit: Audit, place: int) -> dict[str, Any]:
    sides = []
    for i in audit.near.pairs[place]:
        path = audit.images.paths[i]
        sides.append({"image": thumbnail_url(path), "class": audit.images.classes[audit.images.labels[i]], "file": _short(path)})
    return {"sides": sides, "bits": int(audit.near.distances[place]), "cosine": float(audit.near.cosines[place])}


def _label_issue(audit: Audit, place: int) -> dict[str, Any]:
    i, names = int(audit.label_issues.order[place]), audit.images.classes
    label, suggested = int(audit.images.labels[i]), int(audit.label_issues.suggested[place])
    return {
        "image": thumbnail_url(audit.images.paths[i]),
        "file": _short(audit.images.paths[i]),
        "label": names[label],
        "suggested": names[suggested],
        "prob_label": float(np.exp(audit.log_probs[i, label])),
        "prob_suggested": float(np.exp(audit.log_probs[i, suggested])),
    }


def _odd(path: str) -> dict[str, str]:
    return {"image": thumbnail_url(path), "file": _short(Path(path))}


def _short(path: Path) -> str:
    return "/".join(path.parts[-2:])
