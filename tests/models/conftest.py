"""What the tests here share lies beside them (`backbones.py`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
