"""What the tests of whole engines share is found by its neighbours' names, as the processes that they start find it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
