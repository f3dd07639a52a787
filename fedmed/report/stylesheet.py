"""The look of the page: light, for a desk, a phone and paper."""

STYLE = """
:root { --ink: #1b1f24; --soft: #4d5661; --line: #d4d9df; --tint: #f3f6f9;
  --accent: #00538a; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 3vw, 2.5rem) 4rem; max-width: 76rem;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans",
  "Helvetica Neue", Arial, sans-serif; color: var(--ink); background: #fff; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .75rem; overflow-wrap:
  anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .6rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.4rem 0 .4rem; }
p, li { max-width: 46rem; }
p { margin: .5rem 0; }
a { color: var(--accent); }
.kind { color: var(--soft); margin: 0 0 .15rem; font-size: .9rem; }
.lead { font-size: 1.06rem; }
.outcome { border-left: 4px solid var(--accent); padding: .1rem 0 .1rem .9rem;
  margin: 1rem 0; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem;
  padding: 0;
  margin: 1rem 0 0; font-size: .93rem; }
nav a { display: inline-block; padding: .2rem 0; }
.note { color: var(--soft); font-size: .9rem; }
.none { color: var(--soft); font-style: italic; }
.scroll { overflow-x: auto; margin: .8rem 0; }
.scroll:focus-visible, a:focus-visible, summary:focus-visible {
  outline: 3px solid #ffb000; outline-offset: 2px; }
table { border-collapse: collapse; font-size: .91rem; font-variant-numeric:
  tabular-nums;
  min-width: 20rem; }
caption { text-align: left; font-weight: 600; padding: 0 0 .4rem; }
caption span { position: sticky; left: 0; display: inline-block;
  max-width: calc(100vw - 2.2rem); }
caption.hidden span { position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%); }
caption.hidden { padding: 0; }
th, td { padding: .38rem .8rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
thead th { background: var(--tint); vertical-align: bottom; font-weight: 600;
  border-bottom: 2px solid #8a949f; }
tbody th { font-weight: 600; }
.word { text-align: left; }
td.word { white-space: normal; min-width: 5rem; max-width: 26rem;
  overflow-wrap: break-word; }
th.word { overflow-wrap: break-word; }
small { display: block; color: var(--soft); font-size: .86em; white-space: normal; }
figure { margin: 0; }
figcaption { font-size: .87rem; color: var(--soft); margin-top: .25rem; }
.plots { display: grid; gap: 1.5rem 2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
.plot { width: 100%; height: auto; max-width: 30rem; display: block; }
.pictures { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(3, minmax(0, 1fr)); max-width: 54rem; }
.overlay { width: 100%; height: auto; max-height: 24rem; display: block;
  background: #000; }
.overlay .marks text { fill: #fff; stroke: #000; paint-order: stroke;
  font-family: sans-serif; font-weight: 600; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; padding: .55rem .9rem;
  background: #2a2d31; color: #fff; font-size: .9rem; border-radius: 4px;
  width: fit-content; max-width: 100%; }
.key span { display: inline-flex; align-items: center; gap: .5rem; }
details { border: 1px solid var(--line); border-radius: 4px; margin: .7rem 0;
  padding: 0 .9rem; }
details[open] { padding-bottom: .9rem; }
summary { cursor: pointer; padding: .55rem 0; font-weight: 600; }
pre { background: var(--tint); border: 1px solid var(--line); padding: .7rem .9rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .88rem; border-radius:
    4px; }
dl { display: grid; grid-template-columns: minmax(7rem, 11rem) 1fr; gap: .4rem 1rem;
  max-width: 54rem; font-size: .95rem; }
dt { font-weight: 600; }
dd { margin: 0; }
@media (max-width: 40rem) {
  body { padding: 1rem 1rem 3rem; }
  h1 { font-size: 1.4rem; }
  th, td { padding: .34rem .5rem; }
  tbody th:first-child { position: sticky; left: 0; background: #fff; max-width: 7.5rem;
    border-right: 1px solid var(--line); }
  thead th:first-child { position: sticky; left: 0; border-right: 1px solid
    var(--line); }
  .pictures { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .7rem; }
  .pictures figure:first-child:not(:nth-last-child(2)) { grid-column: 1 / -1; }
  dl { grid-template-columns: 1fr; gap: .1rem; }
  dd { margin-bottom: .6rem; }
}
@page { margin: 12mm; }
@media print {
  html { font-size: 10pt; }
  td.word { min-width: 0; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  h2, h3, summary { break-after: avoid; }
  figure, tr, .pictures { break-inside: avoid; }
  .scroll { overflow: visible; }
  table { font-size: 7.5pt; min-width: 0; }
  th, td { padding: .15rem .3rem; }
  small { white-space: normal; }
  thead th, .key, .overlay { print-color-adjust: exact; }
  .plots { grid-template-columns: 1fr 1fr; }
  .pictures { max-width: 15cm; }
  details { border: 0; padding: 0; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""
