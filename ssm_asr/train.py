"""`python -m ssm_asr.train` is `ssm-asr train`."""

from ssm_asr.cli import start

if __name__ == "__main__":
    start("train")
