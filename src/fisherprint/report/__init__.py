"""The report: one function per figure, tables, and the page that shows them (Fig. 3, 5 to 10)."""

from fisherprint.report.document import (
    Section,
    bound_lines,
    bounds_table,
    page,
    roi_table,
    score_table,
    shares_table,
)
from fisherprint.report.figures import (
    bias_histograms,
    compression_cost,
    convergence,
    loss_shares,
    shares_by_bound,
    std_histograms,
)
from fisherprint.report.images import map_panel
from fisherprint.report.trains import (
    bound_maps,
    bounds_against,
    draw_train,
    draw_trains,
    magnetization,
)

__all__ = [
    "Section",
    "bias_histograms",
    "bound_lines",
    "bound_maps",
    "bounds_against",
    "bounds_table",
    "compression_cost",
    "convergence",
    "draw_train",
    "draw_trains",
    "loss_shares",
    "magnetization",
    "map_panel",
    "page",
    "roi_table",
    "score_table",
    "shares_by_bound",
    "shares_table",
    "std_histograms",
]
