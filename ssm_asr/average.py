"""`python -m ssm_asr.average` is `ssm-asr average`."""

from ssm_asr.cli import start

if __name__ == "__main__":
    start("average")
