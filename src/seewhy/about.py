"""Exported file -> what a page or a server says of its classifier."""

from __future__ import annotations

from typing import Any

from seewhy.runtime import OnnxModel

USUAL_PRECISION = 0.95
WITHOUT_PRECISION = 0.5  # least probability of an answer where val could promise no precision


def about(model: OnnxModel, precision: float | None = None) -> dict[str, Any]:
    """JSON-ready facts. unsure_below: least probability of an answer; precision: what it was chosen for on val, or None.

    box_share: None where heatmaps cover the whole picture, else the side of the centred square they cover over the short side.
    Raises ConfigError for a precision that the file does not know.
    """
    facts = model.facts
    if precision is None:  # the usual one, or the highest below it that val could promise
        known = [row["precision"] for row in facts["abstain"] if row["threshold"] is not None]
        precision = max((value for value in known if value <= USUAL_PRECISION), default=None)
    preprocessing = facts["preprocessing"]
    return {
        "classes": list(model.classes),
        "backbone": facts["backbone"]["name"],
        "test_accuracy": facts["test_accuracy"],
        "test_accuracy_ci95": facts["test_accuracy_ci95"],
        "test_pictures": facts["test_pictures"],
        "heatmaps": "heatmaps" in model.outputs,
        "unsure_below": WITHOUT_PRECISION if precision is None else model.threshold_for(precision),
        "precision": precision,
        "unknown_above": facts["unknown_above"],
        "enough": facts["enough"],
        "box_share": preprocessing["crop"] if preprocessing["resize"] == "crop" else None,
        "version": facts["seewhy_version"],
    }
