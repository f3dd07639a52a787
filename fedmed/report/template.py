"""The page itself. A Python string, since a Flower bundle ships `.py` files only."""

from fedmed.report.stylesheet import STYLE

PAGE = (
    """
{%- macro grid(g, titled=true) %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ g.caption }}">
<table>
<caption{% if not titled %} class="hidden"{% endif %}>
<span>{{ g.caption }}</span></caption>
<thead><tr>
{% for title in g.header %}
<th scope="col"{% if loop.index0 < g.num_text %} class="word"{% endif %}>{{ title
}}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in g.rows %}
<tr>
{% for box in row %}
{% set tag = "th" if loop.first else "td" %}
<{{ tag }}{% if loop.first %} scope="row"{% endif %}
{%- if loop.index0 < g.num_text %} class="word"{% endif %}>
{%- if box.is_strong %}<strong>{{ box.text }}</strong>{% else %}{{ box.text }}{% endif
%}
{%- if box.below %}<small>{{ box.below }}</small>{% endif %}</{{ tag }}>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endmacro %}
{%- macro panel(p) %}
<figure>{{ p.svg }}<figcaption>{{ p.caption }}</figcaption></figure>
{% endmacro %}
{%- macro line(colour, dashes) -%}
<svg width="34" height="10" aria-hidden="true"><path d="M1 5H33" fill="none"
 stroke="{{ colour }}" stroke-width="2.4" stroke-dasharray="{{ dashes }}"/></svg>
{%- endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{{ name }}: report</title>
<style>"""
    + STYLE
    + """</style>
</head>
<body>
<header>
<p class="kind">{{ "Report of one run" if single else "Comparison of training
strategies" }}
 · {{ table.kind }}</p>
<h1>{{ name }}</h1>
<p class="lead">{{ studied }}</p>
<p class="lead outcome">{{ outcome }}</p>
<nav aria-label="Contents"><ul>
<li><a href="#sites">Sites</a></li>
<li><a href="#results">Results</a></li>
{% if reference %}<li><a href="#tests">Is it chance?</a></li>{% endif %}
<li><a href="#cases">Cases</a></li>
<li><a href="#pictures">Pictures</a></li>
<li><a href="#course">Course of training</a></li>
<li><a href="#problems">Problems</a></li>
<li><a href="#repeat">Repeat it</a></li>
<li><a href="#words">Words and caveats</a></li>
</ul></nav>
</header>
<main>
<section aria-labelledby="sites">
<h2 id="sites">Sites</h2>
{{ grid(sites, titled=false) }}
</section>

<section aria-labelledby="results">
<h2 id="results">Results</h2>
{% if table.rows and table.sites %}
{{ grid(results) }}
<p class="note">{{ split }} “Overall” is the unweighted mean over sites.
{% if table.rows | length > 1 %}Bold: highest of its column among rows tested alike,
whether or not the
difference
is more than chance.{% endif %}</p>
{% if distances %}
{{ grid(distances) }}
<p class="note">Smaller is better. A missed organ and a false alarm count with the
diagonal of the image as their distance, so neither can improve a mean; the numbers
missed count all seeds.</p>
{% endif %}
{% if classes %}{{ grid(classes) }}{% endif %}
{% if statistics %}<p class="note">{{ statistics }}</p>
{% endif %}
{% if unseen %}
<h3>Hospitals that took no part, by rule</h3>
{{ grid(unseen.grid) }}
{% for note in unseen.notes %}<p class="note">{{ note }}</p>
{% endfor %}
{% endif %}
{% if selected %}
<h3>The round that validation picks</h3>
{{ grid(selected.grid) }}
{% for note in selected.notes %}<p class="note">{{ note }}</p>
{% endfor %}
{% endif %}
{% if transfer %}
<h3>Trained on one site, tested on each</h3>
{{ grid(transfer) }}
{% for note in transfer_notes %}<p class="note">{{ note }}</p>
{% endfor %}
{% endif %}
{% if published %}
<h3>In the layout of the published table</h3>
{{ grid(published) }}
{% for note in published_notes %}<p class="note">{{ note }}</p>
{% endfor %}
{% endif %}
{% else %}
<p class="none">No case has been scored yet.</p>
{% endif %}
{% if same_patients %}
<p class="note"><strong>Slices were divided, not patients: slices of one patient lie in
both
training and test. These values are no evidence for new patients.</strong></p>
{% endif %}
{% if cut_sites %}
<p class="note"><strong>The network saw only a window of each scan, and at
{{ cut_sites }} it cut off part of the organ: that part counts as missed.</strong></p>
{% endif %}
{% for note in table.notes %}<p class="note">{{ note }}</p>
{% endfor %}
</section>

{% if reference %}
<section aria-labelledby="tests">
<h2 id="tests">Is the difference more than chance?</h2>
{% if tests.rows %}
<p>Every case was scored under each strategy, so strategies are compared case by case
with “{{ reference }}”. Seeds of one case are averaged first.
{% if table.kind == "classification" %}A case counts 1 if right and 0 if wrong.{% endif
%}
</p>
{{ grid(tests) }}
<details><summary>The same at each site</summary>
{{ grid(site_tests) }}
</details>
<p class="note">p: two-sided Wilcoxon signed-rank test over patients; several cases of
one are averaged first. p (Holm): corrected
for the number of tests in its table; bold below 0.05. Interval: bootstrap of patients,
each with all cases, within sites, not corrected. The test speaks about further cases of
these same sites and these trained models, not about other hospitals. Where the seeds do
not agree on the sign, a small p should not be relied on.</p>
{% else %}
<p class="none">No case was scored under two strategies, so nothing can be compared.</p>
{% endif %}
</section>
{% endif %}

<section aria-labelledby="cases">
<h2 id="cases">Every case</h2>
{% if cases %}
<div class="plots">
{% for p in cases %}{{ panel(p) }}{% endfor %}
</div>
{% elif table.kind == "classification" %}
<p class="none">A classified case is right or wrong: there is nothing to plot case by
case.</p>
{% else %}
<p class="none">There are no results by case in this folder.</p>
{% endif %}
</section>

<section aria-labelledby="pictures">
<h2 id="pictures">Worst, median and best case of each site</h2>
{% if galleries %}
<div class="key">
{% if class_colours | length > 1 %}
{% for title, colour in class_colours %}
<span>{{ line(colour, "") }} {{ title }}</span>
{% endfor %}
<span>{{ line("#fff", "") }} truth</span>
<span>{{ line("#fff", "5 3") }} prediction</span>
{% else %}
<span>{{ line(truth_colour, "") }} truth, solid</span>
<span>{{ line(prediction_colour, "5 3") }} prediction, dashed</span>
{% endif %}
</div>
<p class="note">Shown as radiologists hang axial slices: R marks the right of the
patient, on the left of the picture; A marks the front. Photographs are shown as
taken. The Dice is that of the whole case, not of the slice. These are images of
patients: treat this page as such.</p>
{% for g in galleries %}
{% if galleries | length > 1 %}
<details{% if g.label == opened %} open{% endif %}><summary>{{ g.label }}</summary>
{% endif %}
{% for site, found in g.sites.items() %}
<h3>Site {{ site }}</h3>
<div class="pictures">
{% for p in found %}{{ panel(p) }}{% endfor %}
</div>
{% endfor %}
{% if galleries | length > 1 %}</details>{% endif %}
{% endfor %}
{% else %}
<p class="none">There are no pictures in this folder.</p>
{% endif %}
{% for note in gallery_notes %}<p class="note">{{ note }}</p>
{% endfor %}
</section>

<section aria-labelledby="course">
<h2 id="course">Course of training</h2>
{% if curves %}
<div class="plots">
{% for p in curves %}{{ panel(p) }}{% endfor %}
</div>
{% if not single %}<p class="note">Losses of different strategies may be different
quantities; compare their course, not their height.</p>{% endif %}
{% else %}
<p class="none">No learning curves were recorded.</p>
{% endif %}
{% if traffic %}{{ grid(traffic) }}
{% else %}<p class="none">No traffic was recorded.</p>{% endif %}
</section>

<section aria-labelledby="problems">
<h2 id="problems">Problems</h2>
<h3>Refused updates and failures</h3>
{% if events %}{{ grid(events, titled=false) }}
{% else %}<p>None: every update that arrived was used.</p>{% endif %}
<h3>Cases left out</h3>
{% if quarantine %}{{ grid(quarantine, titled=false) }}
{% else %}<p>None: every case could be used.</p>{% endif %}
{% if missing %}
<h3>Not in this folder</h3>
<ul>
{% for note in missing %}<li>{{ note }}</li>
{% endfor %}
</ul>
{% endif %}
</section>

<section aria-labelledby="repeat">
<h2 id="repeat">How to repeat it</h2>
{% for command in commands %}<pre>{{ command }}</pre>
{% endfor %}
{{ grid(settings) }}
{% if fingerprints %}{{ grid(fingerprints) }}{% endif %}
{% if versions %}{{ grid(versions) }}
{% else %}<p class="none">No software versions were recorded.</p>{% endif %}
</section>

<section aria-labelledby="words">
<h2 id="words">Words and caveats</h2>
<dl>
{% if table.kind == "segmentation" %}
<dt>Dice</dt><dd>Overlap of prediction and truth: 0 % is none, 100 % is equal. Computed
on the
whole case, not slice by slice.</dd>
<dt>ASD</dt><dd>Average distance between the two surfaces, in mm, both directions taken
together.</dd>
<dt>HD95</dt><dd>95 % of the surface points are nearer than this to the other surface,
in mm.</dd>
<dt>Missed organ</dt><dd>The truth shows it, the prediction shows nothing of it. Dice is
0,
the distance is the diagonal of the image.</dd>
<dt>False alarm</dt><dd>The prediction shows an organ that the truth does not. Dice is
0,
the distance is the diagonal of the image.</dd>
<dt>Empty in both</dt><dd>Neither shows the organ. There is nothing to score, and the
case does
not count for this organ.</dd>
{% else %}
<dt>Balanced accuracy</dt><dd>Mean over the classes of the share of their cases that was
recognised, so that a rare class counts as much as a frequent one.</dd>
<dt>AUC</dt><dd>Chance that a case of the second class gets a higher score than one of
the
first; 50 % is guessing.</dd>
{% endif %}
<dt>Mean ± deviation</dt><dd>Over the cases of a site: how much cases differ. With
several
seeds both are averaged over seeds. The ± of “Overall” is the typical spread within a
site.</dd>
<dt>Between seeds</dt><dd>Spread of the overall value when only the random seed
changes.</dd>
<dt>Worst site</dt><dd>The site with the lowest mean. An average can hide it.</dd>
<dt>Gain over alone</dt><dd>Percentage points above the same site training by itself
(“separate”).</dd>
<dt>Held out, unseen</dt><dd>The site took no part in training; its value says how far
the model
carries to another hospital. Held-out sites are not part of “Overall” where other sites
were
trained on.</dd>
</dl>
<p>These results describe research models on the cases listed here. They are not
evidence for
use in patients.</p>
</section>
</main>
</body>
</html>
"""
)
