"""A model card says where an exported model comes from, as the Hugging Face hub reads it: YAML,
then Markdown.

Scores are huggingface_hub's EvalResults. What a run's files say is shown as code in one line: no
text of theirs becomes a heading, a link or a page.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from featcache.errors import command_line, one_line


def build(
    name: str,
    library: str,
    facts: Mapping[str, str],
    scores: Sequence[Mapping[str, Any]],
    command: Sequence[str],
    usage: str,
    checked: str,
) -> str:
    """Return the text of a card. `facts` are a table, `scores` lines of results.jsonl, `usage`
    Python that loads the model, `checked` a sentence on how it was compared."""
    rows = [("", "Value"), *((key, code(value)) for key, value in facts.items())]
    parts = [
        f"---\n{_metadata(name, library, scores)}\n---",
        f"# {code(name)}",
        "A vision encoder, trained from the stored features of a teacher.",
        _table(rows),
        f"## Use\n\n```python\n{usage}\n```\n\n{checked}",
        "## Scores\n\n" + (_scores(scores) or "None is recorded for these weights."),
    ]
    if command:
        parts.append(f"## Command\n\n{code(command_line(*command))}")
    return "\n\n".join(parts) + "\n"


def _metadata(name: str, library: str, scores: Sequence[Mapping[str, Any]]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="other",
            dataset_name=_plain(row["test"]),
            dataset_config=_plain(row["test"]),  # else the hub takes all sets for one
            metric_type="accuracy",
            metric_name=f"top-1 accuracy, {_plain(row['protocol'])}",
            metric_value=float(row["score"]),
        )
        for row in scores
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = ModelCardData(
            library_name=library,
            pipeline_tag="image-feature-extraction",
            tags=["featcache", "masked-image-modeling"],
            model_name=_plain(name),
            eval_results=results or None,
        )
    return str(data.to_yaml())


def _scores(scores: Sequence[Mapping[str, Any]]) -> str:
    rows = [("Protocol", "Test set", "Top-1", "95 % interval", "Pictures")]
    for row in scores:
        low, high = row["interval"]
        rows.append(
            (
                code(row["protocol"]), code(row["test"]), f"{row['score']:.2f}",
                f"{low:.2f} to {high:.2f}", str(row["n_test"]),
            )
        )  # fmt: skip
    return _table(rows) if scores else ""


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    rule = f"|{' --- |' * len(rows[0])}"
    return "\n".join([lines[0], rule, *lines[1:]])


def code(text: object) -> str:
    """Return text as Markdown code that no character of its own ends or cuts.

    >>> code("a`b|c" + chr(10) + "d")
    "`a'b/c d`"
    """
    plain = _plain(text).replace("`", "'").replace("|", "/")
    return f"`{plain}`" if plain else "` `"


def _plain(text: object) -> str:
    return one_line(str(text)).strip()
