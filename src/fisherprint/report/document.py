"""Tables as HTML, and the self-contained page that holds them and the figures."""

from __future__ import annotations

import base64
import io
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fisherprint import _checks, fisher
from fisherprint.bounds import BoundTable
from fisherprint.evaluate import Audit, Score
from fisherprint.parameters import Parameter
from fisherprint.report.figures import number, percent
from fisherprint.report.images import Named

_DPI = 150


@dataclass(frozen=True, eq=False)
class Section:
    """One part of the page.

    Attributes:
        heading: plain text.
        caption: what one sees and how to read it; plain text.
        content: figures, and HTML that is taken as it is, one after the other.
    """

    heading: str
    caption: str
    content: Figure | str | Sequence[Figure | str]


def shares_table(audit: Audit, parameters: Sequence[Parameter]) -> str:
    """Mean shares of the loss by SNRmax and parameter, as HTML: both terms and their sum.

    Beside them the median over the fingerprints of the standard deviation over √CRB.

    Raises:
        KeyError: a parameter that the audit lacks.
    """
    columns = [_checks.index(parameter.name, audit.names) for parameter in parameters]
    mean, by_parameter = audit.mean_shares(), audit.mean_shares_by_parameter()
    parts = [
        *zip(mean, by_parameter, strict=True),
        (mean.loss, by_parameter.loss),
        (audit.median_std_ratio(), audit.median_std_ratio_by_parameter()),
    ]
    rows = []
    for q in np.argsort(audit.snr):
        groups = [(part[q], *part_by[q, columns]) for part, part_by in parts]
        cells = [number(x) for group in zip(*groups, strict=True) for x in group]
        rows.append([f"{audit.snr[q]:g}", *cells])
    titles = ["all parameters", *map(_html_symbol, parameters)]
    table = _table(
        ["bias", "variance", "loss", "std/√CRB"] * len(titles),
        rows,
        corner="SNR<sub>max</sub>",
        groups=[(title, 4) for title in titles],
    )
    return table + _note(
        "Means of bias²/CRB, variance/CRB and their sum, the loss; medians of std/√CRB. "
        f"{len(audit.truth)} fingerprints, {audit.n_noise} noise realizations each; "
        f"left out are {audit.n_unbounded} for which a parameter's bound is infinite and, at most "
        f"at one SNR, {int(audit.n_failed.max())} with failed estimates (that parameter alone)."
    )


def prior_table(audit: Audit, parameters: Sequence[Parameter]) -> str:
    """Errors by SNRmax and parameter beside the bounds without and with the prior, as HTML.

    Raises:
        KeyError: a parameter that the audit lacks.
        ValueError: an audit without the bounds of the prior.
    """
    prior = audit.require_prior()
    ratio, error = audit.over_prior_bound()
    with_prior = (np.sqrt(prior.local), np.sqrt(prior.overall))
    roots = (audit.root_mean_square, audit.median_root_crb(), *with_prior)
    columns = [_checks.index(parameter.name, audit.names) for parameter in parameters]
    rows = []
    for q in np.argsort(audit.snr):
        cells = [f"{audit.snr[q]:g}"]
        for parameter, e in zip(parameters, columns, strict=True):
            cells += [number(parameter.display_factor * float(root[q, e])) for root in roots]
            cells.append(_uncertain(float(ratio[q, e]), float(error[q, e])))
        rows.append(cells)
    table = _table(
        ["error", "√CRB", "√local", "√global", "error/√global"] * len(columns),
        rows,
        corner="SNR<sub>max</sub>",
        groups=[(_with_unit(parameter), 5) for parameter in parameters],
    )
    spreads = ", ".join(
        f"{p.name} {number(p.display_factor * float(prior.spread[e]))} {p.display_unit}".rstrip()
        for p, e in zip(parameters, columns, strict=True)
    )
    return table + _note(
        "Errors are root mean squares over all fingerprints, those without a bound among them; "
        "√CRB is the median. Van Trees' global bound holds for any estimator, biased or not: no "
        "last column is below 1, but for its standard error and some per cent where the prior is "
        "not normal. It is low where few fingerprints hold most of the information; the mean of "
        f"the local form is nearer to what can be reached. Spread of the prior: {spreads}."
    )


def score_table(scores: Mapping[str, Score], parameters: Sequence[Parameter]) -> str:
    """Loss ± standard error of one or several estimators, as HTML.

    Args:
        scores: by the estimator's name.
        parameters: columns beside the mean over all.

    Raises:
        KeyError: a parameter that a score lacks.
    """
    rows = []
    for label, score in scores.items():
        cells = [escape(label), _uncertain(score.loss, score.standard_error)]
        for parameter in parameters:
            e = _checks.index(parameter.name, score.names)
            cells.append(
                _uncertain(score.loss_by_parameter[e], score.standard_error_by_parameter[e])
            )
        left_out = f"{score.n_unbounded} without bound, {score.n_failed} failed"
        rows.append([*cells, f"{score.n_used}", left_out])
    head = ["all parameters", *map(_html_symbol, parameters), "fingerprints", "left out"]
    return _table(head, rows, corner="estimator")


def roi_table(
    maps: Named,
    regions: Mapping[str, NDArray[np.bool_]],
    parameters: Sequence[Parameter],
    *,
    expected: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
    """Median and quartiles of each region of interest, beside what is expected, as HTML.

    Args:
        maps: by name, SI units.
        regions: masks of the maps' shape, by the region's name.
        parameters: one column each.
        expected: literature value or truth by region and parameter, SI units; both may be partial.

    Raises:
        KeyError: a parameter that the maps lack.
        ValueError: a mask of another shape than the maps.
    """
    rows = []
    for label, mask in regions.items():
        cells = [escape(label), f"{int(mask.sum())}"]
        for parameter in parameters:
            values = maps[parameter.name]
            _checks.shape(
                f"the mask of {label}", mask, list(zip("XYZ", values.shape, strict=False))
            )
            inside = parameter.display_factor * values[mask]
            inside = inside[np.isfinite(inside)]
            cell = "–"
            if inside.size:
                low, median, high = map(number, np.percentile(inside, (25, 50, 75)))
                cell = f"{median} [{low}, {high}]"
            known = (expected or {}).get(label, {}).get(parameter.name)
            if known is not None:
                cell += f"<br><small>expected {number(parameter.display_factor * known)}</small>"
            cells.append(cell)
        rows.append(cells)
    head = [_with_unit(parameter) for parameter in parameters]
    return _table(["voxels", *head], rows, corner="region")


def bounds_table(table: BoundTable) -> str:
    """√CRB of each tissue and train in displayed units, as HTML; below it that over the value.

    Of each train after the first, also its ratio to the first; what is not seen is explained.
    """
    rows = []
    for s, tissue in enumerate(table.tissues):
        for train, label in enumerate(table.trains):
            for observed, root in table.observed.items():
                relative, ratio = table.relative(root), table.ratio(root)
                which = [label] if len(table.trains) > 1 else []
                which += [observed] if len(table.observed) > 1 else []
                cells = []
                for column, parameter in enumerate(table.parameters):
                    place = train, s, column
                    if not np.isfinite(root[place]):
                        cells.append("not seen")
                        continue
                    cell = number(parameter.display_factor * float(root[place]))
                    below = []
                    if np.isfinite(relative[place]):
                        below.append(percent(float(relative[place])))
                    if train > 0 and np.isfinite(ratio[place]):
                        below.append(f"× {number(float(ratio[place]))}")
                    cells.append(_lines(cell, *below))
                rows.append([_lines(tissue, *which), *cells])
    unknown = ", ".join(parameter.name for parameter in table.parameters)
    note = (
        "√CRB, the least standard deviation of an unbiased estimate, at SNR "
        f"{table.snr:g} (|M0|/σ of one cycle) and a scan of {table.scan_time:.3g} s; below it "
        "that over the value"
        + (f", and over the bound of {table.trains[0]}" if len(table.trains) > 1 else "")
        + f". Unknowns: {unknown} and complex M0."
    )
    head = [_with_unit(parameter) for parameter in table.parameters]
    return _table(head, rows, corner="tissue") + "".join(map(_note, [note, *_reasons(table)]))


def bound_lines(table: BoundTable) -> tuple[list[str], list[list[str]], list[str]]:
    """The same as text: titles of the columns, rows, and notes below.

    A row for each tissue and parameter; of each train √CRB in displayed units, that over the
    value, and for trains after the first its ratio to the first.
    """
    head = ["tissue", "parameter", "value"]
    several = len(table.observed) > 1
    for train, label in enumerate(table.trains):
        for observed in table.observed:
            head += [f"{label}\n{observed}" if several else label, "/ value"]
            head += ["ratio"] if train > 0 else []
    rows = []
    for s, tissue in enumerate(table.tissues):
        for column, parameter in enumerate(table.parameters):
            unit = f" ({parameter.display_unit})" if parameter.display_unit else ""
            factor = parameter.display_factor
            cells = ["" if column else tissue, parameter.name + unit]
            cells.append(number(factor * float(table.theta[s, column])))
            for train in range(len(table.trains)):
                for root in table.observed.values():
                    value = float(root[train, s, column])
                    share = float(table.relative(root)[train, s, column])
                    cells.append(number(factor * value) if np.isfinite(value) else "not seen")
                    cells.append(percent(share) if np.isfinite(share) else "")
                    if train > 0:
                        cells.append(number(float(table.ratio(root)[train, s, column])))
            rows.append(cells)
    unknown = ", ".join(parameter.name for parameter in table.parameters)
    cycles = (
        f"{label} {count:.3g} x {duration:.3g} s"
        for label, count, duration in zip(table.trains, table.cycles, table.durations, strict=True)
    )
    notes = [
        f"√CRB at SNR {table.snr:g} (|M0|/σ of one cycle) and a scan of {table.scan_time:.3g} s "
        f"({', '.join(cycles)}).",
        f"Unknowns: {unknown} and complex M0."
        + (f" Known: {', '.join(table.known)}." if table.known else ""),
        *_reasons(table),
    ]
    return head, rows, notes


def _reasons(table: BoundTable) -> list[str]:
    """Why something is not seen, of each tissue and train."""
    return [
        f"Not seen in {tissue} by {train}: {'; '.join(map(fisher.explained, groups))}."
        for (train, tissue), groups in table.confounded.items()
        if groups
    ]


def page(
    title: str, summary: str, sections: Sequence[Section], *, provenance: Mapping[str, object]
) -> str:
    """One HTML page that needs nothing else: figures inlined, no scripts, no links to elsewhere.

    Args:
        title: plain text.
        summary: plain text; an empty line starts a new paragraph.
        sections: in their order.
        provenance: what the results come from: versions, seeds, hashes; the last table.
    """
    parts = [*sections]
    if provenance:
        rows = [[escape(key), escape(str(value))] for key, value in provenance.items()]
        table = f'<div class="text">{_table(["value"], rows, corner="item")}</div>'
        parts.append(Section("Provenance", "What these results were computed from.", table))
    contents = "".join(
        f'<li><a href="#section-{i}">{escape(part.heading)}</a></li>\n'
        for i, part in enumerate(parts, start=1)
    )
    body = "".join(_section(i, part) for i, part in enumerate(parts, start=1))
    paragraphs = "".join(f"<p>{escape(text)}</p>\n" for text in re.split(r"\n\s*\n", summary))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_CSS}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{paragraphs}</header>
<nav aria-label="Contents">
<h2>Contents</h2>
<ol>
{contents}</ol>
</nav>
<main>
{body}</main>
</body>
</html>
"""


_CSS = """
:root { color-scheme: light; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; background: #fff; color: #1a1a1a;
  font: 1rem/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .8rem; }
h2 { font-size: 1.3rem; margin: 0 0 .4rem; }
nav { margin: 1.5rem 0; padding: .8rem 1.2rem; background: #f3f5f7; border-radius: .4rem; }
nav h2 { font-size: 1rem; }
nav ol { margin: 0; padding-left: 1.4rem; columns: 2 16rem; }
a { color: #00548a; }
section { margin: 2.5rem 0 0; padding-top: 1.2rem; border-top: 1px solid #d5d9dd; }
figure { margin: 0; }
figcaption { margin-bottom: 1rem; max-width: 46rem; }
img { display: block; max-width: 100%; height: auto; margin: 0 0 1rem; }
.wide { overflow-x: auto; margin-bottom: .5rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid #d5d9dd; }
thead th { border-bottom: 1px solid #444; vertical-align: bottom; }
thead th[colspan] { text-align: center; border-bottom: 1px solid #d5d9dd; }
th[scope=row], thead tr:first-child th:first-child { text-align: left; }
.text td, .text th { text-align: left; }
td { white-space: nowrap; }
.text td { white-space: normal; overflow-wrap: anywhere; }
small, .note { font-size: .8125rem; color: #4a4a4a; }
sub, sup { line-height: 0; font-size: .75em; }
@media print { body { max-width: none; margin: 0; font-size: 10pt; }
  section { break-inside: avoid; } nav { background: none; border: 1px solid #999; }
  .wide { overflow: visible; } table { font-size: 8pt; } a { color: inherit; } }
"""


def _section(position: int, section: Section) -> str:
    content = [section.content] if isinstance(section.content, Figure | str) else section.content
    inner = "\n".join(part if isinstance(part, str) else _image(part) for part in content)
    return f"""<section id="section-{position}">
<h2>{escape(section.heading)}</h2>
<figure>
<figcaption>{escape(section.caption)}</figcaption>
{inner}
</figure>
</section>
"""


def _image(figure: Figure) -> str:
    """The figure as an inlined PNG; its label is the text for those who cannot see it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    data = base64.b64encode(buffer.getvalue()).decode()
    alt = escape(str(figure.get_label()) or "Figure")
    width = round(96 * figure.get_figwidth())
    return f'<img src="data:image/png;base64,{data}" alt="{alt}" width="{width}">'


def _table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    corner: str,
    groups: Sequence[tuple[str, int]] = (),
) -> str:
    """A table of HTML cells whose first column heads the rows; `groups` span columns above."""
    names = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    if groups:
        spans = (f'<th scope="colgroup" colspan="{n}">{name}</th>' for name, n in groups)
        first = f'<tr><th scope="col" rowspan="2">{corner}</th>{"".join(spans)}</tr>\n'
        top = f"{first}<tr>{names}</tr>"
    else:
        top = f'<tr><th scope="col">{corner}</th>{names}</tr>'
    lines = []
    for label, *cells in rows:
        values = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{label}</th>{values}</tr>\n')
    return (
        f'<div class="wide"><table>\n<thead>\n{top}\n</thead>\n'
        f"<tbody>\n{''.join(lines)}</tbody>\n</table></div>\n"
    )


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>\n'


def _lines(first: str, *small: str) -> str:
    """Lines of a cell, the further ones in small print."""
    return "<br>".join([escape(first), *(f"<small>{escape(text)}</small>" for text in small)])


def _html_symbol(parameter: Parameter) -> str:
    """The LaTeX symbol as HTML: Greek letters and indices; the name if there is more to it."""
    text = escape(parameter.symbol.strip("$"))
    try:
        text = re.sub(r"\\([a-z]+)", _greek, text)
    except KeyError:
        return escape(parameter.name)
    for mark, tag in (("_", "sub"), ("^", "sup")):
        index = rf"{re.escape(mark)}(?:\{{([^{{}}]*)\}}|(\w))"
        text = re.sub(index, rf"<{tag}>\1\2</{tag}>", text)
    return escape(parameter.name) if re.search(r"[\\{}^_]", text) else f"<i>{text}</i>"


def _with_unit(parameter: Parameter) -> str:
    unit = f" ({escape(parameter.display_unit)})" if parameter.display_unit else ""
    return _html_symbol(parameter) + unit


def _greek(command: re.Match[str]) -> str:
    return unicodedata.lookup(f"GREEK SMALL LETTER {command[1].upper()}")


def _uncertain(value: float, error: float) -> str:
    """Value ± error to two digits of the error; the value alone without one."""
    if not (np.isfinite(value) and np.isfinite(error) and error > 0):
        return number(value)
    digits = max(0, 1 - int(np.floor(np.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"
