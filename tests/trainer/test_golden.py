"""Golden losses of the debug configurations: a change of the numbers must be meant."""

from pathlib import Path

import pytest

from tests.trainer.runs import figures, run

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs"
GOLDEN = {
    "debug_mingru": [
        5.59725,
        5.48717,
        5.28263,
        5.01115,
        4.69774,
        4.33613,
        4.00282,
        3.65602,
        3.33442,
        3.02335,
    ],
    "debug_minlstm": [
        5.5589,
        5.44648,
        5.23418,
        4.94757,
        4.60776,
        4.23155,
        3.8768,
        3.52251,
        3.19424,
        2.88121,
    ],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_first_losses_of_the_debug_configuration(name, dataset, tmp_path):
    """Ten steps on the tests' pseudo-text, which is the same on every machine.

    1e-4 relative leaves room for other processors' matrix products, amplified over ten steps.
    """
    options = [f"data.path={dataset}", f"run.dir={tmp_path / 'run'}", "train.stop_after=10"]
    events = run(CONFIGS / f"{name}.yaml", 2, *options)
    losses = [loss for loss, _ in figures(events)]
    assert losses == pytest.approx(GOLDEN[name], rel=1e-4)
