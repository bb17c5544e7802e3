"""`python -m ssm_asr.prepare` is `ssm-asr prepare`."""

from ssm_asr.cli import start

if __name__ == "__main__":
    start("prepare")
