"""Write an audit as a folder: tables, counts, and audit.html with the images behind them."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from seewhy.curation.audit import Audit
from seewhy.curation.label_issues import ISSUE_LOG_ODDS
from seewhy.reports.figures import leak_figure
from seewhy.reports.html import render_page, themed_urls
from seewhy.reports.tables import write_files

PAIRS = 8  # shown per gallery
LABEL_ISSUES = 24  # shown
IMAGE_ISSUES = 6  # shown per kind


def save_audit(audit: Audit, folder: Path) -> list[Path]:
    """Write pairs.csv, groups.csv, labels.csv, confusions.csv, image_issues.csv, audit.html and audit.json; the files written."""
    tables = {
        "pairs.csv": audit.pairs_table(),
        "groups.csv": audit.groups_table(),
        "labels.csv": audit.labels_table(),
        "confusions.csv": audit.confusions_table(),
        "image_issues.csv": audit.image_issues,
    }
    summary, leak = audit.summary(), audit.leak
    labels = tables["labels.csv"].head(LABEL_ISSUES)
    facts: dict[str, Any] = {
        "name": audit.images.name,
        "summary": summary,
        "pairs": _pair_galleries(audit, tables["pairs.csv"]),
        "label_issues": labels[audit.label_issues.log_odds[: len(labels)] < ISSUE_LOG_ODDS].to_dict("records"),
        "confusions": tables["confusions.csv"].head(12).to_dict("records"),
        "image_issues": [(issue, len(rows), rows["path"][:IMAGE_ISSUES]) for issue, rows in audit.image_issues.groupby("issue")],
        "leak": themed_urls(lambda theme: leak_figure(leak.plain, leak.grouped, theme)) if leak else None,
    }
    return write_files(folder, {**tables, "audit.html": render_page("audit.html", facts), "audit.json": summary})


def _pair_galleries(audit: Audit, table: pd.DataFrame) -> list[tuple[str, str, list[dict[Hashable, Any]]]]:
    """(title, explanation, rows of the table): pairs across labels, then of each kind, the least similar first."""
    near = audit.near
    by_hash, by_features = (np.flatnonzero(near.kinds == kind) for kind in ("hash", "features"))
    galleries = [
        (
            "Near-duplicates with different labels",
            "One of the two labels is probably wrong, or the classes overlap.",
            np.flatnonzero(audit.across_labels),
        ),
        ("Exact duplicates", "Files with equal bytes.", np.flatnonzero(near.kinds == "exact")),
        (
            "Near-duplicates by perceptual hash",
            "The pairs that differ most, close to the limit.",
            by_hash[np.lexsort((near.cosines[by_hash], -near.distances[by_hash]))],
        ),
        (
            "Near-duplicates by features",
            "The pairs with the lowest cosine similarity, close to the limit.",
            by_features[np.argsort(near.cosines[by_features], kind="stable")],
        ),
    ]
    return [(title, text, table.iloc[chosen[:PAIRS]].to_dict("records")) for title, text, chosen in galleries if len(chosen)]
