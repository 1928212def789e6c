"""On a GPU: the numbers of the CPU, to the precision that floats leave."""

import pytest
import torch
from fixtures import experiment

from lilliput.engines import Sequential, Workers

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "moon", "rolling_slices"])
@pytest.mark.parametrize("engine", [lambda: Sequential(device="cuda"), lambda: Workers(device="cuda", slots_per_gpu=2)])
def test_a_gpu_gives_the_numbers_of_the_cpu(name: str, engine) -> None:  # type: ignore[no-untyped-def]
    a, b = experiment(name).run(engine()), experiment(name).run(Sequential())
    for key, x in b.state["params"].items():
        torch.testing.assert_close(a.state["params"][key], x, atol=1e-4, rtol=0)


def test_a_spawned_worker_serves_the_cpu_too() -> None:
    a, b = experiment("fedavg").run(Workers(device="cuda")), experiment("fedavg").run(Sequential())
    assert [r["clients"] for r in a.rows] == [r["clients"] for r in b.rows]
