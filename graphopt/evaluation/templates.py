"""The pages, as jinja2 templates; whatever stands in `{{ }}` is escaped."""

from __future__ import annotations

_BASE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ heading }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
h3 { font-size: 1rem; margin-bottom: .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #eee; vertical-align: top; }
td { overflow-wrap: anywhere; } th.n, td.n { text-align: right; white-space: nowrap; }
code { font-size: .9em; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
.rewritten { color: #00694d; } .refused { color: #8a5a00; } .reverted { color: #b3261e; font-weight: bold; }
.note { color: #444; }
</style>
</head>
<body>
<h1>{{ heading }}</h1>
{% block content %}{% endblock %}
</body>
</html>
"""

_PARTS = """
{% macro facts(values) %}<div class="wide"><table>
{% for key, value in values.items() if value is not none %}<tr><th>{{ key }}</th><td>{{ value }}</td></tr>
{% endfor %}</table></div>{% endmacro %}

{% macro table(heads, rows) %}<div class="wide"><table><thead><tr>
{% for head in heads %}<th{% if head.endswith(">") %} class="n"{% endif %}>{{ head.rstrip(">") }}</th>{% endfor %}
</tr></thead><tbody>
{% for row in rows %}<tr>
{% for cell in row %}<td{% if heads[loop.index0].endswith(">") %} class="n"{% endif %}>{{ cell }}</td>{% endfor %}
</tr>
{% endfor %}</tbody></table></div>{% endmacro %}

{% macro listed(notes) %}{% if notes %}<ul class="note">
{% for note in notes %}<li>{{ note }}</li>
{% endfor %}</ul>{% endif %}{% endmacro %}
"""

_TRANSFORM = """{% extends "base" %}
{% import "parts" as parts %}
{% block content %}
{% for name, report in reports %}
<h2>{{ name }}</h2>
<p>Pipeline: {% for item in report.pipeline %}<code>{{ item }}</code>{% if not loop.last %}, then {% endif %}
{% endfor %}</p>
<h3>Model</h3>
{{ parts.table(["", "path", "bytes>", "opset>", "sha256"], files(report)) }}
<p>Calibration: {{ report.calibration or "none" }}</p>
{% for each in report.passes %}
<h3>{{ each.name }} ({{ each.equivalence }}, {{ each.seconds }} s): {{ counts(each) }}</h3>
{% if each.sites %}{% set keys = error_keys(each) %}
<div class="wide"><table><thead><tr><th>site</th><th>kind</th><th>status</th>
{% for key in keys %}<th class="n">{{ key.replace("_", " ") }}</th>{% endfor %}<th>reason</th></tr></thead><tbody>
{% for site in each.sites %}<tr><td>{{ site.name }}</td><td>{{ site.kind }}</td>
<td class="{{ site.status }}">{{ site.status }}</td>
{% for key in keys %}<td class="n">{{ short(site.errors.get(key)) }}</td>{% endfor %}<td>{{ site.reason }}</td></tr>
{% endfor %}</tbody></table></div>
{% if keys %}<p class="note">Errors are relative RMS of a site's output.</p>{% endif %}{% endif %}
{{ parts.listed(each.notes) }}
{% endfor %}
<h3>Outputs, on {{ report.verification.samples }} input sets</h3>
{% if report.verification.unverified %}<p>{{ report.verification.unverified }}</p>{% endif %}
{% if report.verification.outputs %}
{{ parts.table(["output", "largest difference>", "relative RMS>", "cosine>", "bitwise"], outputs(report)) }}{% endif %}
{% set lines = costs(report) %}{% if lines %}<h3>Cost{{ sizes(report) }}</h3>
{{ parts.table(["", "before>", "after>", "after / before>", "expression before", "expression after"], lines) }}
{% endif %}
{{ parts.listed(report.notes) }}
<h3>Environment</h3>
{{ parts.facts(report.environment) }}
{% endfor %}
{% endblock %}
"""

_ABLATION = """{% extends "base" %}
{% import "parts" as parts %}
{% block content %}
<p>Pipeline: {% for item in data.pipeline %}<code>{{ item }}</code>{% if not loop.last %}, then {% endif %}
{% endfor %}</p>
<p>{{ title }}</p>
<h2>Rows</h2>
{{ parts.table(columns, rows) }}
<p class="note">± is one standard error over the texts, of “change” over the differences text by text. Recall is what a
repeated segment of {{ data.recall.segment }} tokens gains from its first copy in nats/token, at that many tokens
between the copies, over {{ data.recall.texts }} texts.</p>
{% for text, source in plots %}<img alt="{{ text }}" src="{{ source }}">
{% endfor %}
{% if data.left_out %}<h2>Left out</h2>
<div class="wide"><table><tbody>
{% for item in data.left_out %}<tr><th>{{ item.label }}</th><td>{{ item.reason }}</td></tr>
{% endfor %}</tbody></table></div>{% endif %}
<h2>How each row was made</h2>
<div class="wide"><table><thead><tr><th>row</th><th>passes</th><th class="n">sites rewritten</th>
<th class="n">others</th><th class="n">seconds</th></tr></thead><tbody>
{% for row in data.rows if row.pipeline %}<tr><td>{{ row.label }}</td>
<td><code>{{ row.pipeline | join(", ") }}</code></td>
<td class="n">{{ row.sites.rewritten }}</td><td class="n">{{ row.sites.refused + row.sites.reverted }}</td>
<td class="n">{{ short(row.seconds) }}</td></tr>
{% endfor %}</tbody></table></div>
{{ parts.listed(data.notes) }}
<h2>Data</h2>
{{ parts.facts({"calibration": data.calibration, "held-out text": data.held_out.description, "seed": data.seed,
  "fit steps": data.fit_steps}) }}
{% if data.input %}<h2>Model</h2>
{{ parts.facts(data.input) }}{% endif %}
<h2>Environment</h2>
{{ parts.facts(data.environment) }}
{% endblock %}
"""

TEMPLATES = {"base": _BASE, "parts": _PARTS, "transform": _TRANSFORM, "ablation": _ABLATION}
