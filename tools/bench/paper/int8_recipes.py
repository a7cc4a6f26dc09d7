"""How each method of the benchmark `int8` learns: tuned for both precisions on `--validate`, never on the test set.

Tried per method and precision: some four to twenty settings of one seed, on images held out of the training set (45°
for fine-tuning); the best one is here. Bits are schedules over the run; fp32 has a cosine.
"""

from agentd.int8.noise import Noise
from tools.bench.paper.int8_runs import Recipe

METHODS = {"ZO": 0, "ElasticZO, last layer": 1, "ElasticZO, last 2": 2, "BP": 5}
SCRATCH = {
    "ZO": Recipe(0, (2, 1, 0, -1), (1,), 5e-4, 0.0, 1e-2),
    "ElasticZO, last layer": Recipe(1, (2, 1, 0, -1), (4, 3, 2), 3e-4, 0.1),
    "ElasticZO, last 2": Recipe(2, (2, 1, 0, -1, -2), (5, 4, 3, 2, 1), 3e-4, 0.1, noise=Noise(7, 128)),
    "BP": Recipe(5, (0,), (4, 3, 2), 0.0, 0.2),
}
FINE_TUNING = {
    "ZO": Recipe(0, (2, 1, 0), (1,), 5e-4, 0.0, 1e-2, Noise(7, 32)),
    "ElasticZO, last layer": Recipe(1, (1, 0, -1), (4, 3, 2, 1, 0), 3e-4, 0.3, noise=Noise(7, 16)),
    "ElasticZO, last 2": Recipe(2, (2, 1, 0), (4, 3, 2, 1, 0), 5e-4, 0.3, noise=Noise(7, 32)),
    "BP": Recipe(5, (0,), (3, 2, 1, 0, -1), 0.0, 0.1),
}
PRETRAINING = Recipe(5, (0,), (5, 4, 3), 0.0, 0.1)
"""LeNet-5 upright, in fp32, that fine-tuning starts from."""
