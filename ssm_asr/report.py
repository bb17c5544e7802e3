"""`python -m ssm_asr.report` is `ssm-asr report`."""

from ssm_asr.cli import start

if __name__ == "__main__":
    start("report")
