"""Golden losses of the debug configurations: a change of the numbers must be meant."""

from pathlib import Path

import pytest

from tests.trainer.runs import figures, run

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs"
GOLDEN = {
    "debug_mingru": [
        5.59491,
        5.48939,
        5.28044,
        5.01349,
        4.70161,
        4.33226,
        4.00381,
        3.65596,
        3.32382,
        3.02241,
    ],
    "debug_minlstm": [
        5.55715,
        5.4484,
        5.23425,
        4.94452,
        4.60508,
        4.2304,
        3.87834,
        3.52466,
        3.19242,
        2.87834,
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
