"""The report: one function per figure, tables, and the page that shows them (Fig. 3 to 10)."""

from fisherprint.report.document import (
    Section,
    bound_lines,
    bounds_table,
    page,
    prior_table,
    roi_table,
    score_table,
    shares_table,
)
from fisherprint.report.figures import (
    bias_histograms,
    compression_cost,
    convergence,
    errors_and_bounds,
    loss_shares,
    shares_by_bound,
    std_histograms,
)
from fisherprint.report.images import map_panel, status_panel
from fisherprint.report.reproduction import (
    Comparison,
    audit_maps,
    bias_of_networks,
    bound_shares_of_networks,
    comparison_table,
    convergences,
    shares_of_networks,
    std_of_networks,
)
from fisherprint.report.trains import (
    bound_maps,
    bounds_against,
    draw_train,
    draw_trains,
    magnetization,
)
from fisherprint.report.tubes import (
    TUBE_COLUMNS,
    TubeEstimates,
    agreement,
    tube_boxes,
    tube_numbers,
)

__all__ = [
    "TUBE_COLUMNS",
    "Comparison",
    "Section",
    "TubeEstimates",
    "agreement",
    "audit_maps",
    "bias_histograms",
    "bias_of_networks",
    "bound_lines",
    "bound_maps",
    "bound_shares_of_networks",
    "bounds_against",
    "bounds_table",
    "comparison_table",
    "compression_cost",
    "convergence",
    "convergences",
    "draw_train",
    "draw_trains",
    "errors_and_bounds",
    "loss_shares",
    "magnetization",
    "map_panel",
    "page",
    "prior_table",
    "roi_table",
    "score_table",
    "shares_by_bound",
    "shares_of_networks",
    "shares_table",
    "status_panel",
    "std_histograms",
    "std_of_networks",
    "tube_boxes",
    "tube_numbers",
]
