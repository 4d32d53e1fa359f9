"""A run -> its model card: README.md with Hugging Face's metadata, from the numbers that the run has measured."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from seewhy.evaluation.metrics import HEADLINE
from seewhy.models.saved_run import SavedRun


def model_card(run: SavedRun, warnings: list[str]) -> str:
    """Markdown with a YAML head, as huggingface.co reads it; every number is of the test part."""
    manifest, test = run.manifest, run.metrics["test"]
    headline = {name: shown for name, shown in HEADLINE.items() if name in test}
    data = {"type": "image-folder", "name": manifest["data"]["name"]}
    head: dict[str, Any] = {
        "library_name": "seewhy",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "seewhy", manifest["backbone"]["timm"]],
        "metrics": ["accuracy"],
        "model-index": [
            {
                "name": run.path.name,
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": data,
                        "metrics": [
                            {"type": name, "value": round(test[name], 4), "name": f"test {shown}"} for name, shown in headline.items()
                        ],
                    }
                ],
            }
        ],
    }
    rows = [
        f"| {shown} | {_shown(name, test[name])} | {' to '.join(_shown(name, v) for v in test[f'{name}_ci95'])} |"
        for name, shown in headline.items()
    ]
    stages = "stage" if run.config.unfreeze == 1 else f"{run.config.unfreeze} stages"
    trained = {0: "its classifier", "all": "all of it"}.get(run.config.unfreeze, f"its last {stages} and its classifier")
    split, calibration = manifest["split"], manifest["calibration"]
    abstain = [
        f"- {row['precision']:.0%} right: answer at a probability of {row['threshold']:.3f} or more; on the test part that answers "
        f"{row['test_answered']:.1%}" + (f", {row['test_right']:.1%} of them right" if row["test_right"] is not None else "")
        for row in calibration["selective"]
        if row["threshold"] is not None
    ]
    more = ["..."] if len(run.classes) > 12 else []
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip()}\n---",
        f"# {escape_markdown(run.path.name)}",
        f"Tells {len(run.classes)} classes of images apart: {', '.join([*map(escape_markdown, run.classes[:12]), *more])}.",
        f"{manifest['backbone']['timm']} with {trained} trained on {split['train']:,} images of "
        f"{escape_markdown(manifest['data']['name'])} ({split['protocol']} split, seed {run.config.seed}; "
        f"{split['val']:,} to validate, {split['test']:,} to test). "
        f"Weights it started from: {escape_markdown(manifest['backbone']['weights'])}.",
        "## Measured",
        f"On {test['n']:,} test images that nothing was chosen by:",
        "| | value | 95% interval |\n| --- | --- | --- |\n" + "\n".join(rows),
        f"Probabilities are calibrated (temperature {calibration['temperature']:.3f}, fitted on the validation part); expected calibration "
        f"error {test['expected_calibration_error']:.1%}.",
        *(["Thresholds below which to say nothing, chosen on the validation part:", "\n".join(abstain)] if abstain else []),
        "## Limits",
        "\n".join(f"- {text}" for text in [*map(escape_markdown, warnings), _ood_note(manifest)]),
        "## Use",
        f'```python\nimport seewhy\n\nrun = seewhy.load({json.dumps(run.path.name.replace("`", ""))})\nrun.predict(["a.jpg"]).table()\n'
        'run.explain(["a.jpg"]).overlay(0)\n```',
        "Weights are in `model.safetensors` under timm's names, everything else in `run.json`; "
        f"seewhy {manifest['versions']['seewhy']}, data sha256 `{manifest['data']['hash'][:16]}`, split sha256 `{split['hash'][:16]}`.",
    ]
    return "\n\n".join(parts) + "\n"


def escape_markdown(text: str) -> str:
    """Text as Markdown that shows just this: names of classes and files are anybody's."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&~$])", r"\\\1", " ".join(text.split()))


def _ood_note(manifest: dict[str, Any]) -> str:
    text = "It knows its classes only: an image of anything else is given one of them"
    if "ood" not in manifest:
        return f"{text}."
    return f"{text}, though `seewhy predict` marks images unlike the training ones (it misses some, and marks about 5% of known ones)."


def _shown(name: str, value: float) -> str:
    return f"{value:.3f}" if name == "macro_f1" else f"{100 * value:.1f}%"
