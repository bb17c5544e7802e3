"""A new encoder is a class, a configuration and one line of the registry; the rest of the project takes it as is."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import toy
from encoders import ENCODERS as TOY_ENCODERS
from torch import Tensor, nn

from ssm_asr.config import ConfigError, from_dict, to_dict, to_yaml
from ssm_asr.encoder.contract import Encoder, EncoderConfig
from ssm_asr.encoder.registry import ENCODERS, EncoderKind, make_encoder
from ssm_asr.encoder.state import leaves, select_states, stack_states, state_sizes
from ssm_asr.evaluation.describe import describe
from ssm_asr.fields import setting
from ssm_asr.search.encoding import encode_as_streamed, pad_to_chunks
from ssm_asr.training.optim import ScaledAdam
from ssm_asr.transducer.model import ModelConfig, Transducer


@dataclass
class LstmConfig(EncoderConfig):
    """A recurrent encoder, which has nothing in common with those of the project."""

    kind: str = "lstm"
    dim: int = setting(48, least=1, most=4096)

    @property
    def causal(self) -> bool:
        return True

    @property
    def downsampling(self) -> tuple[int, ...]:
        return (2,)

    @property
    def embed_dim(self) -> int:
        return self.dim // 2


class LstmState(NamedTuple):
    hidden_BD: Tensor
    cell_BD: Tensor


class Lstm(Encoder):
    """Joins pairs of frames and runs an LSTM over them; it needs no left context, and sees nothing of the future."""

    def __init__(self, config: LstmConfig) -> None:
        super().__init__()
        self.config, self.out_channels = config, config.dim
        self.lstm = nn.LSTM(2 * config.embed_dim, config.dim, batch_first=True)

    def forward(self, x_BTD: Tensor, lens_B: Tensor, chunk: int, left_context: int | Tensor) -> tuple[Tensor, Tensor]:
        x_BTD = nn.functional.pad(x_BTD, (0, 0, 0, x_BTD.shape[1] % 2))
        return self.stream(x_BTD, self.init_state(len(x_BTD), 0, x_BTD.device), None)[0], (lens_B + 1) // 2

    def init_state(self, batch_size: int, left_context: int, device: torch.device | None = None) -> LstmState:
        return LstmState(*(torch.zeros(batch_size, self.out_channels, device=device) for _ in range(2)))

    def stream(self, x_BTD: Tensor, state: LstmState, processed_B: Tensor | None) -> tuple[Tensor, LstmState]:
        B, T, E = x_BTD.shape
        start = tuple(tensor[None].contiguous() for tensor in state)
        out_BSD, end = self.lstm(x_BTD.reshape(B, T // 2, 2 * E), start)
        return out_BSD, LstmState(*(tensor[0] for tensor in end))


SECTION = {"kind": "lstm", "dim": 48, "embed_channels": [4, 4, 8], "chunk_frames": [16, -1], "left_context_frames": [0]}


@pytest.fixture
def lstm(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The model section of a toy experiment with the foreign encoder, which one line has made known."""
    monkeypatch.setitem(ENCODERS, "lstm", EncoderKind(LstmConfig, Lstm))
    return {"encoder": SECTION}


def test_configurations_know_a_registered_encoder(lstm: dict) -> None:
    experiment = toy.experiment(model=lstm)
    encoder = experiment.model.encoder
    assert encoder == LstmConfig(dim=48, embed_channels=(4, 4, 8), chunk_frames=(16, -1), left_context_frames=(0,))
    assert from_dict(to_dict(experiment)) == experiment and "kind: lstm" in to_yaml(experiment)
    for section, message in (
        ({"dim": 0}, "model.encoder.dim is 0; give a whole number from 1 to 4096"),
        ({"chunk_frames": [15]}, r"model.encoder.chunk_frames is \[15\]; give multiples of 2, or -1 for all"),
        ({"layers": 3}, "model.encoder.layers: no such field"),
        ({"kind": "gru"}, "model.encoder.kind is 'gru'; give one of zipformer, conformer, lstm"),
        ({"kind": ["lstm"]}, r"model.encoder.kind is \['lstm'\]; give one of zipformer, conformer, lstm"),
    ):
        with pytest.raises(ConfigError, match=message):
            toy.experiment(model={"encoder": SECTION | section})


def test_an_encoder_that_is_not_registered_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.encoder\.kind is 'lstm'; give one of zipformer, conformer"):
        Transducer(ModelConfig(LstmConfig()), 5)


def test_a_contract_half_kept_is_refused() -> None:
    class Mute(EncoderConfig):
        """It says neither how wide its frames are nor whether it can stream."""

    class Deaf(Lstm):
        """It has no pass over whole utterances."""

        forward = Encoder.forward

    with pytest.raises(TypeError, match="abstract"):
        Mute()
    with pytest.raises(TypeError, match="abstract"):
        Deaf(LstmConfig())


def test_a_registered_encoder_trains(lstm: dict) -> None:
    torch.manual_seed(0)
    model = Transducer(toy.experiment(model=lstm).model, 6).train()
    optimizer = ScaledAdam(model.parameters(), lr=0.02)
    features_BTF, tokens_BU = torch.randn(3, 90, 80), torch.tensor([[1, 2, 3], [4, 2, 1], [3, 3, 0]])
    batch = (features_BTF, torch.tensor([90, 80, 71]), tokens_BU, torch.tensor([3, 3, 2]))
    totals = []
    for _ in range(40):
        losses = model(*batch, *model.config.encoder.draw_context())
        assert losses.ctc_B is not None
        total = (losses.simple_B + losses.pruned_B + losses.ctc_B).sum()
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        totals.append(total.item())
    assert totals[-1] < 0.5 * totals[0], totals


@torch.no_grad()
def test_a_registered_encoder_streams_as_it_encodes_whole_utterances(lstm: dict, tmp_path: Path) -> None:
    loaded = toy.write_checkpoint(tmp_path / "model.pt", model=lstm)
    model = loaded.model
    assert isinstance(model.encoder, Lstm)
    features_BTF, lens_B = 3 * torch.randn(2, 300, 80) - 5, torch.tensor([300, 211])
    whole_BSD, counts = encode_as_streamed(model, features_BTF, lens_B, 16, 0)
    for b, count in enumerate(counts):
        padded_TF, state, outputs = pad_to_chunks(features_BTF[b, : lens_B[b]], 16), model.init_state(1, 0), []
        for start in range(0, len(padded_TF) - 13, 32):
            out_1SD, state = model.stream(padded_TF[None, start : start + 45], state)
            outputs.append(out_1SD)
        torch.testing.assert_close(torch.cat(outputs, dim=1)[:, :count], whole_BSD[b : b + 1, :count])
    facts = describe(loaded.experiment, 29, 16, 0)
    assert facts["state_floats_by_kind"]["hidden"] == facts["state_floats_by_kind"]["cell"] == 48


@pytest.mark.parametrize("name", TOY_ENCODERS)
def test_what_the_contract_says_of_states(name: str) -> None:
    """States are zeros at the start, batch first, and named alike whatever the batch."""
    section, left_context = TOY_ENCODERS[name]
    config = toy.experiment(model={"encoder": section}).model.encoder
    encoder = make_encoder(config).eval()
    assert isinstance(encoder, Encoder) and encoder.config is config
    state = encoder.init_state(3, left_context)
    assert all(len(tensor) == 3 and not tensor.any() for _, tensor in leaves(state))
    assert state_sizes(state) == state_sizes(encoder.init_state(1, left_context))
    x_BTD, processed_B = torch.randn(3, 16, config.embed_dim), torch.zeros(3, dtype=torch.int64)
    with torch.no_grad():
        out_BSD, new = encoder.stream(x_BTD, state, processed_B)
        alone = [encoder.stream(x_BTD[b : b + 1], select_states(state, [b]), processed_B[:1]) for b in range(3)]
    assert out_BSD.shape == (3, 8, encoder.out_channels)
    together = stack_states([end for _, end in alone])
    for (name_new, one), (name_alone, other) in zip(leaves(new), leaves(together), strict=True):
        assert name_new == name_alone
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
