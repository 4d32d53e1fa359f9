"""Write a run's model card: README.md with the metadata of the Hugging Face Hub."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from seewhy.evaluation.metrics import HEADLINE
from seewhy.models.saved_run import SavedRun


def model_card(run: SavedRun, warnings: list[str]) -> str:
    """Markdown with a YAML header for huggingface.co; all metrics are of the test part."""
    manifest, test = run.manifest, run.metrics["test"]
    headline = {name: shown for name, shown in HEADLINE.items() if name in test}
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"type": "image-folder", "name": manifest["data"]["name"]},
        "metrics": [{"type": name, "value": round(test[name], 4), "name": f"test {shown}"} for name, shown in headline.items()],
    }
    header: dict[str, Any] = {
        "library_name": "seewhy",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "seewhy", manifest["backbone"]["timm"]],
        "metrics": ["accuracy"],
        "model-index": [{"name": run.path.name, "results": [result]}],
    }
    rows = [
        f"| {shown} | {_format(name, test[name])} | {' to '.join(_format(name, v) for v in test[f'{name}_ci95'])} |"
        for name, shown in headline.items()
    ]
    stages = "stage" if run.config.unfreeze == 1 else f"{run.config.unfreeze} stages"
    trained = {0: "its classifier", "all": "all layers"}.get(run.config.unfreeze, f"its last {stages} and its classifier")
    split, calibration = manifest["split"], manifest["calibration"]
    thresholds = [
        f"- target precision {row['precision']:.0%}: threshold {row['threshold']:.3f}; test coverage {row['test_answered']:.1%}"
        + (f", test accuracy {row['test_right']:.1%}" if row["test_right"] is not None else "")
        for row in calibration["selective"]
        if row["threshold"] is not None
    ]
    more = ["..."] if len(run.classes) > 12 else []
    limits = "It always predicts one of its classes, also for an image of anything else"
    limits += "; `seewhy predict` flags most images unlike the training images, and about 5% of the others." if "ood" in manifest else "."
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip()}\n---",
        f"# {escape_markdown(run.path.name)}",
        f"An image classifier with {len(run.classes)} classes: {', '.join([*map(escape_markdown, run.classes[:12]), *more])}.",
        f"{manifest['backbone']['timm']} with {trained} trained on {split['train']:,} images of "
        f"{escape_markdown(manifest['data']['name'])} ({split['protocol']} split, seed {run.config.seed}; "
        f"{split['val']:,} for validation, {split['test']:,} for testing). "
        f"Initial weights: {escape_markdown(manifest['backbone']['weights'])}.",
        "## Metrics",
        f"On {test['n']:,} test images, which no choice was based on:",
        "| | value | 95% interval |\n| --- | --- | --- |\n" + "\n".join(rows),
        f"Probabilities are calibrated (temperature {calibration['temperature']:.3f}, fitted on the validation part); expected calibration "
        f"error {test['expected_calibration_error']:.1%}.",
        *(["Confidence thresholds, chosen on the validation part:", "\n".join(thresholds)] if thresholds else []),
        "## Limits",
        "\n".join(f"- {text}" for text in [*map(escape_markdown, warnings), limits]),
        "## Use",
        f'```python\nimport seewhy\n\nrun = seewhy.load({json.dumps(run.path.name.replace("`", ""))})\nrun.predict(["a.jpg"]).table()\n'
        'run.explain(["a.jpg"]).overlay(0)\n```',
        "Weights are in `model.safetensors` under timm's names, everything else in `run.json`; "
        f"seewhy {manifest['versions']['seewhy']}, data sha256 `{manifest['data']['hash'][:16]}`, split sha256 `{split['hash'][:16]}`.",
    ]
    return "\n\n".join(parts) + "\n"


def escape_markdown(text: str) -> str:
    """Escape Markdown's special characters in untrusted text, such as class names, and join its lines."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&~$])", r"\\\1", " ".join(text.split()))


def _format(name: str, value: float) -> str:
    return f"{value:.3f}" if name == "macro_f1" else f"{100 * value:.1f}%"
