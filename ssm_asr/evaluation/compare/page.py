"""The page of a comparison: one file that needs neither another file nor a script."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import kaldialign
import numpy as np
from jinja2 import Environment, StrictUndefined

from ssm_asr import config
from ssm_asr.evaluation.compare.cells import Model, Row
from ssm_asr.evaluation.compare.figures import left_text, rate_name
from ssm_asr.evaluation.compare.tables import Table
from ssm_asr.evaluation.results import read_score, read_texts
from ssm_asr.evaluation.scoring import split_units

WORST = 10  # utterances shown of a test set


class Utterance(NamedTuple):
    """One utterance as several models recognised it.

    Attributes:
        heard: for each model its label, its number of errors and the parts of `aligned`.
    """

    cuts: str
    id: str
    heard: list[tuple[str, int, list[tuple[str, str, str]]]]


def aligned(ref: str, hyp: str, unit: str) -> list[tuple[str, str, str]]:
    """Aligns a hypothesis with its reference, by words or by characters.

    Returns:
        (kind, right, said) of every position. The kind is same, sub, del or ins; of a deletion `said` is empty, of an
        insertion `right`.
    """
    parts = []
    for right, said in kaldialign.align(split_units(ref, unit), split_units(hyp, unit), ""):
        kind = "same" if right == said else "ins" if not right else "del" if not said else "sub"
        parts.append((kind, right, said))
    return parts


def worst_utterances(rows: list[Row], cells_dir: Path) -> Iterator[Utterance]:
    """Yields the utterances of each test set with most errors, all models together.

    Each model is taken at the narrowest chunk and with its longest left context.
    """
    narrowest_ms = min(row["chunk_ms"] for row in rows)
    for name in dict.fromkeys(row["cuts"] for row in rows):
        chosen: dict[str, Row] = {}  # rows come with growing left context
        for row in rows:
            if (row["cuts"], row["chunk_ms"]) == (name, narrowest_ms):
                chosen[row["model"]] = row
        directories = [cells_dir / row["directory"] for row in chosen.values()]
        scores = [read_score(directory, rows[0]["unit"]) for directory in directories]
        texts = [read_texts(directory) for directory in directories]
        errors_U = np.sum([score.errors_U for score in scores], axis=0)
        for u in sorted(range(len(errors_U)), key=lambda u: -errors_U[u])[:WORST]:
            utterance = scores[0].ids[u]
            heard = [
                (
                    f"{row['model']}, {left_text(row['left_frames'])}",
                    int(score.errors_U[u]),
                    aligned(refs[utterance], hyps[utterance], row["unit"]),
                )
                for row, score, (refs, hyps) in zip(chosen.values(), scores, texts, strict=True)
            ]
            if errors_U[u]:
                yield Utterance(name, utterance, heard)


def html(
    models: list[Model],
    rows: list[Row],
    tables: list[Table],
    figures: list[tuple[str, str]],
    worst: list[Utterance],
    commit: str,
    note: str,
) -> str:
    """Makes the page. All texts are escaped; in the figures, matplotlib has done so.

    Args:
        figures: the SVG element and the caption of each.
        commit: the commit of the program that makes the page. Those of the cells are shown as well.
        note: a line to put on top; it may be empty.
    """
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(PAGE)
    return template.render(
        rate=rate_name(rows),
        unit=rows[0]["unit"],
        gap=" " if rows[0]["unit"] == "word" else "",
        narrowest_ms=min(row["chunk_ms"] for row in rows),
        models=models,
        yaml={model.name: config.to_yaml(model.experiment) for model in models},
        rows=rows,
        tables=tables,
        figures=figures,
        worst=worst,
        commits=list(dict.fromkeys([*(row["commit"] for row in rows), commit])),
        note=note,
    )


PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ rate }} against chunk width</title>
<style>
:root { --paper: #ffffff; --ink: #1b1c1f; --faint: #6a6c75; --line: #d9dae0; --band: #f5f5f8;
  --sub: #8a5a00; --sub-band: #fff0cc; --del: #a3261b; --del-band: #fde3df; --ins: #005c99; --ins-band: #dcefff; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #151619; --ink: #e4e4e7; --faint: #9c9ea8; --line: #36383f; --band: #1e2024;
    --sub: #ffcf70; --sub-band: #43330d; --del: #ff9d92; --del-band: #4a1e1a; --ins: #8fcbff; --ins-band: #12344f; } }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .25rem; }
p { margin: .25rem 0 .75rem; max-width: 48rem; } .faint, figcaption { color: var(--faint); font-size: .875rem; }
figure { margin: 2rem 0 0; } figure svg { display: block; max-width: 100%; height: auto; }
figcaption { max-width: 48rem; margin: .5rem 0 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { vertical-align: bottom; font-weight: 600; } tbody tr:hover { background: var(--band); }
.utterance { margin: 1rem 0; padding: .6rem .8rem; background: var(--band); border-radius: .4rem; }
.utterance p { margin: .4rem 0 0; max-width: none; overflow-wrap: anywhere; line-height: 1.9; }
.who { display: block; color: var(--faint); font-size: .8rem; line-height: 1.3; }
del, ins, .sub { padding: .05em .2em; border-radius: .2em; } .sub del, .sub ins { padding: 0; background: none; }
del { color: var(--del); background: var(--del-band); text-decoration: line-through; }
ins { color: var(--ins); background: var(--ins-band); text-decoration: underline; }
.sub { background: var(--sub-band); } .sub del, .sub ins { color: var(--sub); }
pre { overflow-x: auto; padding: .8rem; background: var(--band); font-size: .8rem; line-height: 1.4; }
summary { cursor: pointer; padding: .2rem 0; }
</style>
</head>
<body>
<h1>{{ rate }} against chunk width</h1>
{% if note %}
<p><strong>{{ note }}</strong></p>
{% endif %}
<p>Every utterance was recognised chunk by chunk, as in use, with each model's state carried from chunk to chunk.
The {{ rate }} is the error rate in {{ "words" if unit == "word" else "characters, spaces left out" }}.</p>
<p class="faint">Commit {{ commits | join(", ") }}.</p>
{% for svg, caption in figures %}
<figure>{{ svg | safe }}<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
{% for table in tables %}
<h2>{{ table.title }}</h2>
<p class="faint">{{ table.note }}</p>
{% if table.rows | length > 20 %}<details><summary>all {{ table.rows | length }} rows</summary>{% endif %}

<div class="wide"><table>
<thead><tr>{% for cell in table.header %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% if table.rows | length > 20 %}</details>{% endif %}

{% endfor %}
<h2>The worst utterances</h2>
<p class="faint">Those with most errors, all models together, at {{ narrowest_ms }} ms, each model with its longest left
context. <span class="sub"><del>right</del> <ins>said</ins></span> is a substitution, <del>left out</del> a deletion,
<ins>put in</ins> an insertion.</p>
{% for utterance in worst %}
<div class="utterance"><strong>{{ utterance.id }}</strong> <span class="faint">{{ utterance.cuts }}</span>
{% for label, errors, parts in utterance.heard %}
<p><span class="who">{{ label }}: {{ errors }} {{ "error" if errors == 1 else "errors" }}</span>
{% for kind, right, said in parts %}
{% if kind == "same" %}{{ right }}\
{% elif kind == "sub" %}<span class="sub"><del>{{ right }}</del>{{ gap }}<ins>{{ said }}</ins></span>\
{% elif kind == "del" %}<del>{{ right }}</del>{% else %}<ins>{{ said }}</ins>{% endif %}{{ gap }}
{%- endfor %}</p>
{% endfor %}
</div>
{% else %}
<p>None has an error.</p>
{% endfor %}
<h2>Configurations</h2>
{% for model in models %}
<details><summary>{{ model.name }}</summary><pre>{{ yaml[model.name] }}</pre></details>
{% endfor %}
</body>
</html>
"""
