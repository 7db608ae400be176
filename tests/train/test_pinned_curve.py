"""The losses of a small training as they were when this was written.

All other tests compare a training with another of the same version: a change that bends both alike
(a decay that is applied twice, a rate that is a step late) passes them.
"""

import curves as training
import pytest
import ranks

# Written with five decimals. Vector instructions of another width, with which sums are taken in
# another order, changed none of them; a mistake in the arithmetic changes the third.
TOLERANCE = 1e-4

CURVES = {
    "sgd": [1.99280, 1.95833, 1.85967, 1.70025, 1.54448, 1.38452,
            1.23936, 1.20719, 1.12537, 1.02042, 1.02155, 1.03894],
    "adamw": [1.99280, 1.73694, 1.36651, 1.06343, 0.76359, 0.53536,
              0.35844, 0.30662, 0.31033, 0.21462, 0.19355, 0.21248],
}  # fmt: skip


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return ranks.run(training.pinned_curves, tmp_path_factory.mktemp("pinned"), 1)[0]


@pytest.mark.parametrize("engine", ["deepspeed", "single"])
@pytest.mark.parametrize("optimizer", CURVES)
def test_the_losses_of_a_training_are_what_they_were(
    curves: dict[str, list[float]], optimizer: str, engine: str
) -> None:
    assert curves[f"{engine} {optimizer}"] == pytest.approx(CURVES[optimizer], rel=TOLERANCE)
