"""``make test-full``, after ``make test``: run the long campaigns and write what they found to docs/reports/.

python -m tests.full                      all of them, about 25 minutes on two quiet cores
python -m tests.full test_soak.py         one of them
python -m tests.full --soak-minutes 60    a longer soak
"""

import argparse
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> int:
    """Run what is named, or all; 0 if all of it passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.full", description=__doc__)
    parser.add_argument("--reports", type=Path, default=Path("docs/reports"), help="the folder of the report")
    parser.add_argument("--soak-minutes", type=float, default=4.0)
    parser.add_argument("-k", dest="select", default="", help="as pytest's")
    parser.add_argument("names", nargs="*", help="files of tests/full; none: all")
    options = parser.parse_args()
    os.environ["IMAGEMESH_SOAK_MINUTES"] = str(options.soak_minutes)

    import pytest

    from tests.full.report import Recorder, machine, page, path_for

    here = Path(__file__).parent
    recorder, began = Recorder(), datetime.now(UTC)
    names = [str(here / name) for name in options.names] or [str(here)]
    code = int(pytest.main(["-q", "--timeout=1800", "-k", options.select, *names], plugins=[recorder]))
    if recorder.campaigns:
        options.reports.mkdir(parents=True, exist_ok=True)
        path = path_for(options.reports, began)
        path.write_text(page(list(recorder.campaigns.values()), machine(), began, datetime.now(UTC)))
        print(f"written to {path}")
    return code


if __name__ == "__main__":
    sys.exit(main())
