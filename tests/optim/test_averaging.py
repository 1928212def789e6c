"""A mean of subspaces: independent of bases and order, and the subspace itself where all agree."""

import pytest
import torch
from torch import nn

from lilliput import optim
from lilliput.optim.basis import haar_basis


def subspace(seed: int, transposed=False) -> torch.Tensor:
    P = haar_basis(3, 20, torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.float64)).matrix
    return P.mT.contiguous() if transposed else P


def mean(trees, weights=None) -> dict:
    running = optim.MeanSubspace()
    for tree, weight in zip(trees, weights or [1.0] * len(trees), strict=True):
        running.add(tree, weight)
    return running.result()


def projector(P: torch.Tensor) -> torch.Tensor:
    return P.mT @ P if P.shape[0] < P.shape[1] else P @ P.mT


@pytest.mark.parametrize("transposed", [False, True])
def test_clients_that_agree_keep_their_subspace_whatever_its_basis(transposed):
    P = subspace(0)
    turned = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0] @ P
    trees = [{"0.P": x.mT if transposed else x} for x in (P, -P, turned)]
    found = mean(trees)["0.P"]
    assert found.shape == trees[0]["0.P"].shape
    torch.testing.assert_close(projector(found), projector(P))


def test_order_does_not_matter_and_weights_do():
    trees = [{"0.P": subspace(i)} for i in range(3)]
    forward, backward = mean(trees, [1.0, 2.0, 3.0])["0.P"], mean(trees[::-1], [3.0, 2.0, 1.0])["0.P"]
    torch.testing.assert_close(projector(forward), projector(backward))
    alone = mean(trees, [1e-9, 1.0, 1e-9])["0.P"]
    torch.testing.assert_close(projector(alone), projector(subspace(1)), atol=1e-6, rtol=0)


def test_the_mean_shares_more_with_its_clients_than_they_do_with_each_other():
    trees = [{"0.P": subspace(i)} for i in range(4)]
    found = projector(mean(trees)["0.P"])
    with_mean = [float((found * projector(t["0.P"])).sum()) for t in trees]
    among = float((projector(trees[0]["0.P"]) * projector(trees[1]["0.P"])).sum())
    assert sum(with_mean) / 4 > among


def test_different_ranks_are_refused():
    running = optim.MeanSubspace()
    running.add({"0.P": torch.eye(3, 20)})
    with pytest.raises(ValueError, match="must share rank"):
        running.add({"0.P": torch.eye(4, 20)})


def test_assigned_projections_are_those_of_the_next_step():
    p, P = nn.Parameter(torch.randn(24, 20, dtype=torch.float64)), subspace(7)
    optimizer = optim.GaLoreAdamW([{"params": [p], "rank": 3}], lr=0.01)
    optim.assign_projections(optimizer, {"0.P": P})
    before = p.detach().clone()
    p.grad = torch.randn(24, 20, dtype=torch.float64)
    optimizer.step()
    delta = p.detach() - before
    torch.testing.assert_close(delta, delta @ projector(P))
    assert torch.equal(optim.projections(optimizer)["0.P"], P)
    with pytest.raises(ValueError, match="another model"):
        optim.assign_projections(optimizer, {"1.P": P})
