"""Jobs compose stages; run one as `python -m jobs.NAME recipe.yaml key=value ...`."""

import sys
from pathlib import Path

_SOURCE = Path(__file__).resolve().parents[1] / "platform"
if (_SOURCE / "raylign").is_dir() and str(_SOURCE) not in sys.path:
    sys.path.insert(0, str(_SOURCE))  # a checkout; when installed there is nothing to do
