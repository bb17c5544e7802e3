"""Lets the tests import their helpers by name, and keeps torch to one thread.

On tiny tensors several threads gain nothing, and where other programs run they wait for one another without end.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
