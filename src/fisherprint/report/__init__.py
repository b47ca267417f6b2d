"""The report: one function per figure, tables, and the page that shows them (Fig. 3, 5 to 10)."""

from fisherprint.report.document import Section, page, roi_table, score_table, shares_table
from fisherprint.report.figures import (
    bias_histograms,
    compression_cost,
    convergence,
    draw_train,
    loss_shares,
    shares_by_bound,
    std_histograms,
)
from fisherprint.report.images import map_panel

__all__ = [
    "Section",
    "bias_histograms",
    "compression_cost",
    "convergence",
    "draw_train",
    "loss_shares",
    "map_panel",
    "page",
    "roi_table",
    "score_table",
    "shares_by_bound",
    "shares_table",
    "std_histograms",
]
