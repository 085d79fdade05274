"""The style sheet of a report: colours by name, once for light and once for dark, and where things stand."""

from __future__ import annotations

__all__ = ["STYLE"]

_LIGHT = {
    "page": "#ffffff",
    "raised": "#f4f6f8",
    "ink": "#1b2530",
    "faint": "#5c6b7a",
    "rule": "#dde3e9",
    "loss": "#1f6fb2",
    "repeated": "#b98900",
    "evaluation": "#7a3fb0",
    "fault": "#c8302c",
    "injected": "#d9730d",
    "recovered": "#23884b",
    "attempt": "#5c6b7a",
    "useful": "#23884b",
    "stall": "#7a3fb0",
    "lost": "#d9a400",
    "detect": "#e2701a",
    "restore": "#c8302c",
    "startup": "#8595a5",
    "between": "#b9c4cf",
    "closing": "#5c6b7a",
    "inside": "#ffffff",
}
_DARK = {
    "page": "#12181f",
    "raised": "#1b232c",
    "ink": "#e4eaf0",
    "faint": "#9aa9b8",
    "rule": "#2f3a46",
    "loss": "#5fb0f0",
    "repeated": "#e8bb3e",
    "evaluation": "#c08ff0",
    "fault": "#ff6f69",
    "injected": "#ffa14f",
    "recovered": "#58c786",
    "attempt": "#9aa9b8",
    "useful": "#3fae6c",
    "stall": "#a873dd",
    "lost": "#d9b23c",
    "detect": "#ee8a3c",
    "restore": "#e2554f",
    "startup": "#7d8d9d",
    "between": "#4b5966",
    "closing": "#a3b1be",
    "inside": "#0d1217",
}


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


_KINDS = ("useful", "stall", "lost", "detect", "restore", "startup", "between", "closing", "loss", "repeated")
_MARKS = ("fault", "injected", "recovered", "attempt", "evaluation")
_BY_KIND = "".join(
    f".part.{kind}{{fill:var(--{kind})}}.line.{kind}{{stroke:var(--{kind})}}.swatch.{kind}{{background:var(--{kind})}}"
    for kind in _KINDS
) + "".join(
    f".mark.{kind} line{{stroke:var(--{kind})}}.mark.{kind} .tag{{fill:var(--{kind})}}"
    f".mark.{kind} .sign{{fill:var(--{kind})}}.dots.{kind}{{fill:var(--{kind})}}"
    f".swatch.{kind}{{background:var(--{kind})}}"
    for kind in _MARKS
)

_LAYOUT = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1020px;margin:0 auto;padding:24px 20px 64px}
h1{font-size:24px;line-height:1.25;margin:0 0 16px;overflow-wrap:anywhere}
h2{font-size:19px;margin:40px 0 12px;padding-bottom:6px;border-bottom:1px solid var(--rule)}
h3{font-size:15px;margin:0 0 8px;overflow-wrap:anywhere}
p{margin:8px 0;max-width:75ch;color:var(--faint)}
.level3{margin:12px 0;padding:14px 16px;
background:var(--raised);border-left:3px solid var(--fault);border-radius:4px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:10px;margin:0 0 20px}
.tiles div{background:var(--raised);border-radius:6px;padding:10px 14px}
.tiles dt{color:var(--faint);font-size:13px}
.tiles dd{margin:2px 0 0;font-size:20px;font-weight:600;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.facts{display:grid;grid-template-columns:minmax(90px,max-content) 1fr;gap:3px 18px;margin:0}
.facts dt{color:var(--faint)}
.facts dd{margin:0;overflow-wrap:anywhere;white-space:pre-wrap}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;min-width:540px;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:5px 20px 5px 0;
border-bottom:1px solid var(--rule);white-space:pre-line}
th{color:var(--faint);font-weight:500}
th:last-child,td:last-child{padding-right:0}
.number{text-align:right;white-space:nowrap}
figure{margin:14px 0}
figcaption{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;color:var(--faint);margin-top:4px}
.swatch{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:7px;background:var(--faint)}
pre{background:var(--raised);border-radius:4px;padding:10px 12px;margin:8px 0;overflow:auto;max-height:420px;
font:12.5px/1.45 ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
.level3 pre{background:var(--page)}
summary{cursor:pointer;color:var(--faint);margin-top:6px}
svg{display:block;width:100%;min-width:680px;height:auto;font:12px system-ui,"DejaVu Sans",sans-serif}
svg.bar{min-width:0}
.grid{stroke:var(--rule)}.base{stroke:var(--faint)}
.tick,.axis{fill:var(--faint)}.row{fill:var(--ink)}.inside{fill:var(--inside);font-weight:600}
.tag{font-weight:600;font-size:11px}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.line.repeated{stroke-width:4;opacity:.8}
.mark line{stroke-width:1.4}
.mark.injected line{stroke-dasharray:2 3}.sign{stroke:none}.mark.attempt line{stroke-dasharray:6 4}
.band{fill:var(--faint);opacity:.25}
.band.outage{fill:var(--fault);opacity:.22}
.band.full{fill:var(--recovered);opacity:.8}.band.reduced{fill:var(--lost);opacity:.85}
.band.degraded{fill:var(--fault);opacity:.85}.band.world{fill:var(--loss);opacity:.55}
.swatch.outage,.swatch.degraded{background:var(--fault)}.swatch.full{background:var(--recovered)}
.swatch.reduced{background:var(--lost)}
.swatch.outage{opacity:.35}
"""

_MEDIA = """
@media print{body{font-size:12px}main{max-width:none;padding:0}section.level3,figure,table{break-inside:avoid}
h2{break-after:avoid}pre{max-height:none}svg,table{min-width:0}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
@media (max-width:560px){main{padding:16px 12px 48px}.facts{grid-template-columns:1fr;gap:0}.facts dt{margin-top:6px}}
"""

STYLE = (
    f":root{{color-scheme:light dark;{_variables(_LIGHT)}}}"
    f"@media (prefers-color-scheme:dark){{:root{{{_variables(_DARK)}}}}}"
    f"{_LAYOUT}{_BY_KIND}{_MEDIA}"
)
