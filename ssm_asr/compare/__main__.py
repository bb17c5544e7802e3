"""python -m ssm_asr.compare"""

import sys

from ssm_asr.compare import main

if __name__ == "__main__":  # not in the processes that --jobs starts
    sys.exit(main())
