"""The encoders that a configuration can name by `model.encoder.kind`. A new one is one new file and one line here."""

from typing import Any, NamedTuple

from ssm_asr.encoder.conformer import Conformer, ConformerConfig
from ssm_asr.encoder.contract import Encoder, EncoderConfig
from ssm_asr.encoder.zipformer import Zipformer, ZipformerConfig
from ssm_asr.fields import ConfigError, shown


class EncoderKind(NamedTuple):
    """A configuration, and the encoder that is made of one."""

    config: type[EncoderConfig]
    encoder: type[Encoder]


ENCODERS: dict[str, EncoderKind] = {
    "zipformer": EncoderKind(ZipformerConfig, Zipformer),
    "conformer": EncoderKind(ConformerConfig, Conformer),
}


def encoder_kind(kind: Any = ZipformerConfig.kind) -> EncoderKind:
    """Looks up an encoder by its name.

    Raises:
        ConfigError: The name is none of an encoder; the message lists those that there are.
    """
    if not isinstance(kind, str) or kind not in ENCODERS:
        raise ConfigError(f"{EncoderConfig.section_name}.kind is {shown(kind)}; give one of {', '.join(ENCODERS)}")
    return ENCODERS[kind]


def make_encoder(config: EncoderConfig) -> Encoder:
    """Makes the encoder of a configuration, with random weights.

    Raises:
        ConfigError: The kind of the configuration is not in ENCODERS.
    """
    return encoder_kind(config.kind).encoder(config)
