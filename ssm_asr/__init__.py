"""Streaming speech recognition with Zipformer, Conformer and state-space encoders.

    model = ssm_asr.load("averaged.pt")
    print(model.transcribe("a.wav").text)

docs/api.md shows the rest. What is named here is imported when it is used, so that importing a module of the package
does not import all of it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssm_asr.api import Model, Result, Stream, load

__version__ = "0.2.0"  # setup.py reads it here
__all__ = ["Model", "Result", "Stream", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Imports what the front door gives out when it is first used (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ssm_asr import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
