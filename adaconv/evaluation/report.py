"""An evaluation on one HTML page that needs no other file: the verdict, the scores, the first outputs."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from adaconv import pages
from adaconv.evaluation import metrics
from adaconv.evaluation.gate import Verdict, change, interval
from adaconv.evaluation.metrics import METRICS, OF_PAIRS
from adaconv.evaluation.protocol import Protocol
from adaconv.evaluation.scores import SHOWN, Scores, thumbnail
from adaconv.images import to_float

_PAGE = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")


def render(scores: Sequence[Scores], protocol: Protocol, verdict: Verdict | None, *, judge: str, alias: str) -> str:
    """The page.

    Args:
        scores: of each model, the one that is judged first, the unchanged contents last.
        protocol: what they were measured on.
        verdict: on the first; None if nobody asked.
        judge: the weights of the encoder that compared.
        alias: what it was about.
    """
    facts = {
        "model": scores[0].model,
        "protocol": f"{protocol.id}: {len(protocol.contents)} contents × {len(protocol.styles)} styles at "
        f"{protocol.side} pixels, styles read at {protocol.style_side}",
        "judge": f"{judge}, {protocol.judge[:12]}",
    }
    parts = {
        "title": html.escape(f"Evaluation of {scores[0].model}"),
        "facts": pages.facts(facts),
        "verdict": _verdict(scores[0].model, verdict, alias) if verdict else "",
        "scores": _table(scores) + _changes(scores[0], scores[1:-1]),
        "metrics": pages.facts(_definitions()),
        "outputs": _outputs(scores, protocol),
    }
    return pages.fill(_PAGE, parts)


def _verdict(model: str, verdict: Verdict, alias: str) -> str:
    kind, said = ("good", "may become") if verdict.promoted else ("bad", "may not become")
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in verdict.reasons)
    head = f'<h2>Gate</h2><p class="verdict {kind}">{html.escape(model)} {said} {html.escape(alias)}</p>'
    rows = "".join(
        f"<tr><td>{one.metric}</td><td class='n'>{100 * one.change:+.1f} %</td>"
        f"<td class='n'>{100 * one.at_most:+.1f} %</td><td class='n'>{100 * one.worse_allowed:+.1f} %</td>"
        f"<td>{one.verdict}</td></tr>"
        for one in verdict.comparisons
    )
    table = "<table><tr><th>metric</th><th>change</th><th>surely at most</th><th>allowed</th><th></th></tr>"
    return head + f"<ul>{reasons}</ul>" + (f"{table}{rows}</table>" if rows else "")


def _table(scores: Sequence[Scores]) -> str:
    lines = ["<table><tr><th></th>" + "".join(f"<th>{name}</th>" for name in METRICS) + "</tr>"]
    for one in scores:
        cells = []
        for name in METRICS:
            told = interval(one.of[name])
            cells.append(f'<td class="n">{told.mean:.4g}<br><small>{told.low:.4g} … {told.high:.4g}</small></td>')
        defects = "".join(f'<br><small class="bad">{html.escape(defect)}</small>' for defect in one.defects)
        lines.append(f'<tr class="line"><td>{html.escape(one.model)}{defects}</td>{"".join(cells)}</tr>')
    return "".join(lines) + "</table>"


def _changes(judged: Scores, others: Sequence[Scores]) -> str:
    """Pair by pair; green and red where the interval leaves no doubt."""
    if not others:
        return ""
    lines = ["<table><tr><th></th>" + "".join(f"<th>{name}</th>" for name in METRICS) + "</tr>"]
    for other in others:
        cells = []
        for name in METRICS:
            told = change(judged.of[name], other.of[name])
            kind = " good" if told.high < 0 else " bad" if told.low > 0 else ""
            between = f"{100 * told.low:+.1f} … {100 * told.high:+.1f} %"
            cells.append(f'<td class="n{kind}">{100 * told.mean:+.1f} %<br><small>{between}</small></td>')
        lines.append(f'<tr class="line"><td>against {html.escape(other.model)}</td>{"".join(cells)}</tr>')
    intro = f"Change of {html.escape(judged.model)} against the others on the same pairs, with 95 % intervals."
    return f"<p>{intro} Below 0 is better.</p>" + "".join(lines) + "</table>"


def _definitions() -> dict[str, str]:
    """Of each metric, out of the module's own text."""
    told: dict[str, str] = {}
    for line in (metrics.__doc__ or "").splitlines():
        name = line.partition(" ")[0]
        if name in METRICS:
            told[name] = line.removeprefix(name).strip()
        elif line.startswith("   ") and told:
            told[list(told)[-1]] += " " + line.strip()
    return told


def _outputs(scores: Sequence[Scores], protocol: Protocol) -> str:
    contents, styles = protocol.contents[:SHOWN], protocol.styles[:SHOWN]
    top = "<span></span>" + "".join(_img(thumbnail(to_float(one.pixels)), one.source) for one in styles)
    parts = []
    for one in scores[:-1]:  # the contents themselves are the first column
        cells = [top]
        for c, content in enumerate(contents):
            cells.append(_img(thumbnail(to_float(content.pixels)), content.source))
            for s in range(len(styles)):
                told = ", ".join(f"{name} {one.of[name][c, s]:.4g}" for name in OF_PAIRS)
                cells.append(_img(one.shown[c, s], told))
        columns = f"grid-template-columns: repeat({len(styles) + 1}, 112px)"
        parts.append(
            f'<h3>{html.escape(one.model)}</h3><div class="wide"><div class="grid" style="{columns}">'
            f"{''.join(cells)}</div></div>"
        )
    return "".join(parts)


def _img(jpeg: bytes, told: str) -> str:
    title = html.escape(told, quote=True)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" alt="{title}" title="{title}">'
