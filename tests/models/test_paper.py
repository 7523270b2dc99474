"""What the paper says of sizes, on the modules themselves."""

import pytest

from models.config import ModelConfig
from models.mixer import build_mixer


def _recurrence_weights(name: str, expansion: int, width: int) -> int:
    """Weights of the recurrence alone: the paper leaves out the output projection, and biases."""
    config = ModelConfig(
        mixer=name, width=width, expansion=float(expansion), conv_width=0, gate=False
    )
    mixer = build_mixer(name, config)
    part = mixer.preactivations if name.startswith("min") else mixer.rnn
    return sum(p.numel() for p in part.parameters() if p.dim() == 2)


@pytest.mark.parametrize(
    ("expansion", "mingru_percent", "minlstm_percent"),
    [(1, 33, 38), (2, 22, 25), (3, 17, 19), (4, 13, 15)],
)
def test_parameters_over_those_of_gru_and_lstm(expansion, mingru_percent, minlstm_percent):
    """2 / (3 (1 + e)) and 3 / (4 (1 + e)), exactly; the paper's section 3 rounds them so.

    The paper gives GRU and LSTM a hidden size of e times the width, and so does this.
    """
    width = 64
    count = {
        name: _recurrence_weights(name, expansion, width)
        for name in ("mingru", "gru", "minlstm", "lstm")
    }
    gru, lstm = count["mingru"] / count["gru"], count["minlstm"] / count["lstm"]
    assert gru == pytest.approx(2 / (3 * (1 + expansion)), abs=1e-12)
    assert lstm == pytest.approx(3 / (4 * (1 + expansion)), abs=1e-12)
    assert abs(100 * gru - mingru_percent) <= 0.51
    assert abs(100 * lstm - minlstm_percent) <= 0.51
