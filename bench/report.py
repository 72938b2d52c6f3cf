"""One HTML file of recorded results: their tables, their figures, and what they were measured on."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2
import tables

PAGE = jinja2.Template(
    """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>fastpeft benchmarks</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 0.5rem 0 } img { max-width: 100% }
th, td { border-bottom: 1px solid #ccc; padding: 0.15rem 0.7rem; text-align: right }
th:first-child, td:first-child { text-align: left }
p { color: #555 }
</style>
<h1>fastpeft benchmarks</h1>
{% for name, record in records.items() %}
<p>{{ name }}: <code>{{ record.command }}</code>, commit {{ record.commit }},
{{ record.machine.gpu or record.machine.processor }};
{% for name, version in record.versions.items() %}
{{ name }} {{ version }}{{ "." if loop.last else "," }}
{% endfor %}
</p>
{% endfor %}
{% for name, data in figures.items() %}
<img alt="{{ name }}" src="data:image/png;base64,{{ data }}">
{% endfor %}
{% for table in tables %}
<h2>{{ table.title }}</h2>
<table>
<tr>{% for cell in table.header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
<p>{{ table.note }}</p>
{% endfor %}
</html>
""",
    autoescape=True,
)


def write(path: Path, folder: Path, records: dict[str, dict[str, Any]], figures: dict[str, Path]) -> None:
    """Write the page, its figures inside; a compile report and how a GPU's steps ended come from `folder`."""
    images = {name: base64.b64encode(png.read_bytes()).decode() for name, png in figures.items()}
    every = [*tables.steps(folder), *tables.compiled(folder), *tables.every(records)]
    page = PAGE.render(records=records, figures=images, tables=every)
    path.write_text(page, encoding="utf-8")
