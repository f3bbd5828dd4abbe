"""The style sheet of the report: light and dark, for screens of any width and for paper."""

LIGHT = """
--page: #fcfcfa; --ink: #1b1f24; --soft: #5c6570; --rule: #e2e3df; --axis: #a7adb3; --wash: #f3f3ef; --alarm: #9a3412;
--hue0: #d6331f; --hue1: #5f6b7a; --hue2: #2167c9; --hue3: #0d8a6a; --hue4: #9a6a00; --hue5: #7a43b6;
--hue6: #c03a86; --hue7: #4d7c0f;
"""
DARK = """
--page: #15181c; --ink: #e9ebee; --soft: #a0a9b4; --rule: #2b3138; --axis: #5b6570; --wash: #1d2126; --alarm: #fdba74;
--hue0: #ff6f59; --hue1: #a3afbd; --hue2: #6ea8fe; --hue3: #3fc79a; --hue4: #e0b040; --hue5: #bd93f0;
--hue6: #f287bd; --hue7: #a3d14f;
"""

STYLE = (
    f"""
:root {{ color-scheme: light dark; {LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
@media print {{ :root {{ color-scheme: light; --page: #fff; }} }}
"""
    """
* { box-sizing: border-box; }
html { background: var(--page); -webkit-text-size-adjust: 100%; }
body {
  max-width: 940px; margin: 0 auto; padding: 48px 24px 64px; color: var(--ink); background: var(--page);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "Noto Sans", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
h1, h2, h3, p { overflow-wrap: anywhere; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 16px; text-wrap: balance; }
h2 { font-size: 20px; letter-spacing: -0.01em; margin: 56px 0 14px; }
h3 { font-size: 13.5px; font-weight: 600; margin: 0 0 4px; }
p { margin: 0 0 12px; max-width: 72ch; }
.verdict { font-size: 19px; line-height: 1.45; padding-left: 16px; border-left: 4px solid var(--hue0); }
header .verdict { margin-bottom: 20px; }
.verdicts { margin: 16px 0 0; padding-left: 20px; color: var(--soft); font-size: 15px; max-width: 78ch; }
.verdicts li { margin-bottom: 6px; overflow-wrap: anywhere; }
.note { color: var(--soft); font-size: 13.5px; margin: 10px 0; max-width: 90ch; }
.warning { color: var(--alarm); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; }
th, td { padding: 7px 8px; text-align: left; vertical-align: baseline; }
th:first-child { padding-left: 0; }
td:last-child, th:last-child { padding-right: 0; }
thead th { color: var(--soft); font-weight: 500; font-size: 13px; border-bottom: 1px solid var(--axis); }
thead th, thead .number { vertical-align: bottom; white-space: normal; }
tbody tr { border-bottom: 1px solid var(--rule); }
tbody th { font-weight: 400; min-width: 9em; }
.number { text-align: right; white-space: nowrap; }
.strong, .lead th, .lead td { font-weight: 600; }
.quiet { color: var(--soft); font-size: 13px; font-weight: 400; }
td.words { min-width: 10em; }
.pairs { width: auto; font-size: 13.5px; }
.pairs th, .pairs td { padding-top: 4px; padding-bottom: 4px; }
.pairs th { color: var(--soft); min-width: 8em; }
tbody th.marked { position: relative; padding-left: 44px; min-width: 12em; }
.swatch { position: absolute; left: 0; top: 12px; width: 36px; height: 14px; }
figure { margin: 40px 0 0; break-inside: avoid; }
figcaption { color: var(--soft); font-size: 13.5px; margin-top: 6px; max-width: 90ch; }
figcaption b { color: var(--ink); }
figure .scroll > svg { display: block; width: 100%; min-width: 620px; height: auto; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 24px 20px; }
.panels > div { break-inside: avoid; }
.panels svg { display: block; width: 100%; height: auto; }
details { border-top: 1px solid var(--rule); padding: 8px 0; font-size: 14.5px; }
details:last-of-type { border-bottom: 1px solid var(--rule); }
summary { cursor: pointer; }
summary:focus-visible { outline: 2px solid var(--hue2); outline-offset: 3px; border-radius: 2px; }
figure + details { margin-top: 14px; }
pre { background: var(--wash); padding: 14px 16px; border-radius: 6px; margin: 10px 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
pre, code { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
footer { margin-top: 56px; padding-top: 14px; border-top: 1px solid var(--rule); }
footer p { color: var(--soft); font-size: 13.5px; margin: 0; }
svg text { font-size: 12.5px; fill: var(--ink); }
svg .tick, svg .unit { fill: var(--soft); }
svg .value { font-weight: 600; }
svg .name.lead { font-weight: 600; }
.grid { stroke: var(--rule); }
.axis { stroke: var(--axis); }
.level { stroke: var(--soft); stroke-dasharray: 5 4; stroke-width: 1.4; }
text.level { stroke: none; fill: var(--soft); }
.line { fill: none; stroke: var(--hue); stroke-width: 1.9; stroke-linejoin: round; stroke-linecap: round; }
.line.lead { stroke-width: 2.8; }
.line.faint { stroke-width: 1.1; }
.band { fill: var(--hue); fill-opacity: 0.11; stroke: none; }
.mark { fill: var(--hue); stroke: var(--page); stroke-width: 1; }
.hollow { fill: none; stroke: var(--hue); stroke-width: 1.2; stroke-opacity: 0.75; }
.leader { fill: none; stroke: var(--axis); stroke-width: 0.9; }
.mean { stroke: var(--hue); stroke-width: 2.4; stroke-linecap: round; }
.reach { stroke: var(--hue); stroke-width: 7; stroke-opacity: 0.18; stroke-linecap: round; }
.hue0 { --hue: var(--hue0); } .hue1 { --hue: var(--hue1); } .hue2 { --hue: var(--hue2); } .hue3 { --hue: var(--hue3); }
.hue4 { --hue: var(--hue4); } .hue5 { --hue: var(--hue5); } .hue6 { --hue: var(--hue6); } .hue7 { --hue: var(--hue7); }
@media (max-width: 600px) { body { padding: 28px 16px 48px; } h1 { font-size: 25px; } .verdict { font-size: 17px; } }
@media print {
  body { max-width: none; padding: 0; font-size: 11pt; }
  h2 { margin-top: 28px; break-after: avoid; }
  .scroll { overflow: visible; }
  table { break-inside: avoid; }
}
"""
)
