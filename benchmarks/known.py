"""What known maps of B0 and B1 are worth: bounds of the coefficients with and without them.

    python benchmarks/known.py RUN [--known B1 --known B0,B1]

Of each test fingerprint of the run, √CRB where parameters are known over √CRB where all are
unknown; medians and quartiles over the fingerprints, of what the run's network estimates. The
networks beside them: `fisherprint vary RUN -o NEW --set 'training.inputs=["B1"]'`, and
`benchmarks/beyond.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from fisherprint import experiment


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--known", action="append", help="names; B1, B0 and both if not given")
    arguments = parser.parse_args()
    run = experiment.open_run(arguments.run)
    data, _, _ = experiment.read_data(run)
    estimated = run.experiment.training.estimated
    columns = [data.names.index(name) for name in estimated]
    unknown = data.crb("test")[:, columns]
    print(f"{len(unknown)} test fingerprints, {data.basis.rank} coefficients\n")
    print(f"| known | {' | '.join(estimated)} |")
    print("|---" * (1 + len(columns)) + "|")
    for names in arguments.known or ["B1", "B0", "B0,B1"]:
        known = data.crb("test", known=names.split(","))[:, columns]
        cells = []
        for before, after in zip(unknown.T, known.T, strict=True):
            bounded = np.isfinite(before)
            ratio = np.sqrt(after[bounded] / before[bounded])
            low, median, high = np.percentile(ratio, (25, 50, 75))
            cells.append(f"{median:.3f} [{low:.3f}, {high:.3f}]")
        print(f"| {names} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
