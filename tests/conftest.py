"""Lets the tests import their helpers by name, and keeps torch to one thread, also in the programs that tests start.

On tiny tensors several threads gain nothing, where other programs run they wait for one another without end, and sums
come out differently with another number of them.
"""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, by whatever test comes first

sys.path.insert(0, str(Path(__file__).parent))
