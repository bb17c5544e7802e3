"""Package metadata. tools/setup.sh installs the tested versions, those of tools/constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = Path(__file__).parent / "ssm_asr"

setup(
    name="ssm-asr",
    version=re.findall(r'__version__ = "(.+)"', (PACKAGE / "__init__.py").read_text(encoding="utf-8"))[0],
    description="Streaming speech-recognition recipes: Zipformer and state-space encoders, pruned RNN-T",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ssm_asr", "ssm_asr.*"]),
    package_data={"ssm_asr": ["py.typed"]},
    entry_points={"console_scripts": ["ssm-asr = ssm_asr.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "numpy",
        "lhotse>=1.33",
        "urllib3",  # lhotse imports it without asking for it
        "scipy",  # likewise, to resample
        "sentencepiece",
        "soundfile",
        "kaldi-native-fbank",
        "kaldialign",
        "safetensors",
        "pyyaml",
        "tensorboard",
        "tqdm",
        "matplotlib",
        "jinja2",
    ],
    extras_require={
        # To make the small corpora; pyopenjtalk-plus imports sudachipy and pydantic without asking for them.
        "corpus": ["hibari-tts", "onnxruntime", "pyopenjtalk-plus", "sudachipy", "sudachidict-core", "pydantic"],
        "export": ["onnx", "onnxruntime", "sherpa-onnx"],
        "dev": ["mypy", "pytest", "pytest-xdist", "ruff", "types-PyYAML", "types-tqdm"],
    },
)
