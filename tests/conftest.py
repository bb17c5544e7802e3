"""Lets the tests import their helpers by name, and keeps torch to one thread where many tests run at once."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
