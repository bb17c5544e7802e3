"""python -m ssm_asr.compare"""

import sys

from ssm_asr.compare import main
from ssm_asr.program import run

if __name__ == "__main__":  # not in the processes that --jobs starts
    sys.exit(run(main))
