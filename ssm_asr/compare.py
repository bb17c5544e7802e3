"""`python -m ssm_asr.compare` is `ssm-asr compare`."""

from ssm_asr.cli import start

if __name__ == "__main__":
    start("compare")
