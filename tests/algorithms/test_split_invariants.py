"""The invariants of split learning, numbered, and where each is held: in this file, or under the name given.

I1  SplitFed with one client is training of the joined model, step for step; both versions agree.
I2  SplitFed v1 is FedAvg with a model per client.                I3  Only version 2 depends on the order of clients.
I4  Bytes are those of the closed forms.                          I5  Activations cost SplitFed what gradients do.
I6  The head does not matter to the server at first, and q beyond the round is one step per client.
I7  CSE-FSL with the server's copy for a head is not SplitFed, but begins like it.
I8  A head with the server's weights, or these and a row common to all classes, estimates the true gradient.
I9  A linear head aligns to a linear server.                      I10 A full-batch alignment of small steps descends.
I11 The memory: newest, in order, with labels.                    I12 Targets do not depend on the batches of alignment.
I13 Aggregation is convex, keeps equal models and dtypes of integers, and knows no order.
I14 The server's step leaves the device's part alone, and the other way round; no graph travels.
I15 Optimizers outlive rounds.   I16 A byte budget ends a run with the round that meets it.
I17 Dirichlet partitions.                                         I18 Parts are the model.
I19 Quantised activations.                                        I20 Text: blocks that run, padding, masks, adapters.
I21 A resumed run is the straight one.
"""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures import assert_same_state, batches
from split_toys import run, two_parts
from torch import Tensor, nn

from lilliput.algorithms import CseFsl, FslSage, SplitFedV1
from lilliput.algorithms.fsl_sage import Aligner
from lilliput.core import tree
from lilliput.core.fleet import Reply
from lilliput.splitter import Split
from lilliput.submodel import reduce, uniform_mean, weighted_mean

METHODS = "algorithms/test_split_methods.py"
HELD = {
    "I1": [(METHODS, "test_splitfed_with_one_client_is_sgd"),
           (METHODS, "test_one_client_makes_both_versions_of_splitfed_the_same")],
    "I2": [(METHODS, "test_splitfed_v1_is_fedavg_to_the_last_bit")],
    "I3": [(METHODS, "test_the_order_of_clients_matters_to_version_two_alone")],
    "I4": [(METHODS, "test_bytes_by_kind_with_uneven_batches"),
           (METHODS, "test_the_published_mebibytes_of_resnet18")],
    "I5": [(METHODS, "test_bytes_by_kind_with_uneven_batches")],
    "I6": [(METHODS, "test_a_long_interval_gives_the_server_one_step_per_client_and_round")],
    "I8": [(METHODS, "test_a_head_equal_to_the_server_gives_the_servers_gradients")],
    "I9": [(METHODS, "test_a_linear_head_aligns_to_a_linear_server")],
    "I10": [(METHODS, "test_alignment_leaves_the_server_as_it_is")],
    "I11": [(METHODS, "test_the_memory_keeps_the_newest_with_their_labels")],
    "I12": [(METHODS, "test_alignment_does_not_depend_on_its_batch_size"),
            ("algorithms/test_split_text.py", "test_an_examples_target_depends_on_no_other_and_not_on_padding")],
    "I14": [(METHODS, "test_no_graph_outlives_a_call")],
    "I15": [("golden/test_split.py", "test_every_step_of_every_client_and_of_the_server_is_replayed")],
    "I16": [("experiment/test_stop.py", "test_every_method_stops_at_its_byte_budget")],
    "I17": [("data/test_partition.py", "test_equal_sizes"),
            ("data/test_partition.py", "test_large_alpha_is_iid_and_small_alpha_is_not"),
            ("data/test_partition.py", "test_each_index_once_and_the_same_again")],
    "I18": [("splitter/test_architectures.py", "test_every_boundary_of_blocks_to_the_bit"),
            ("splitter/test_architectures.py", "test_gradients_of_a_tied_table_add_up_exactly")],
    "I19": [("wire/test_codecs_int8.py", "test_no_number_is_off_by_more_than_its_blocks_step"),
            ("wire/test_codecs_int8.py", "test_rounding_is_right_on_average")],
    "I20": [("splitter/test_architectures.py", "test_blocks_that_run_are_those_configured"),
            ("algorithms/test_split_text.py", "test_padding_changes_nothing"),
            ("algorithms/test_split_text.py", "test_alignment_sees_the_labels_that_training_sees"),
            ("tasks/test_split_task.py", "test_adapters_alone_travel")],
    "I21": [("laws/test_laws.py", "test_resumed_run_equals_straight_run")],
}  # fmt: skip
HERE = ("I6", "I7", "I8", "I10", "I13", "I14")


def test_every_invariant_is_held_somewhere() -> None:
    tests = Path(__file__).parents[1]
    assert {f"I{i}" for i in range(1, 22)} == HELD.keys() | set(HERE)
    own = Path(__file__).read_text()
    assert all(f"def test_{name.lower()}_" in own for name in HERE)
    for file, name in [place for places in HELD.values() for place in places]:
        assert f"def {name}(" in (tests / file).read_text(), f"{file} has no {name}"


def part(params: tree.Tree, name: str) -> tree.Tree:
    return {n: x for n, x in params.items() if n.startswith(name)}


def test_i6_the_server_does_not_see_the_head_within_the_first_batch() -> None:
    method = FslSage(lr=0.1, local_steps=1)
    heads = [nn.Linear(8, 3), nn.Linear(8, 3)]
    nn.init.eye_(heads[0].weight), nn.init.zeros_(heads[1].weight)
    ends = [run(method, two_parts(head), rounds=1).state["params"] for head in heads]
    assert_same_state(part(ends[0], "server"), part(ends[1], "server"))
    assert not torch.equal(ends[0]["client.0.weight"], ends[1]["client.0.weight"])


@pytest.mark.parametrize("steps", [1, 2])
def test_i7_a_head_that_is_the_servers_copy_begins_like_splitfed(steps: int) -> None:
    """The first step is the same; for the second, head and server have moved by different optimizers."""
    on = two_parts(norm=False)
    on = Split(on.model.client, on.model.server, copy.deepcopy(on.model.server))  # type: ignore[union-attr, arg-type]
    settings: dict[str, Any] = {"lr": 0.1, "local_steps": steps}
    data = {0: [batch for own in batches().values() for batch in own]}
    cse = CseFsl(**settings, server_update_interval=1, auxiliary_optimizer="sgd", auxiliary_lr=0.05)
    a, b = (part(run(m, on, data, rounds=1).state["params"], "client") for m in (cse, SplitFedV1(**settings)))
    assert all(torch.equal(x, b[n]) for n, x in a.items()) == (steps == 1)


def test_i8_a_row_common_to_all_classes_changes_no_estimate() -> None:
    """Logits only shifted: the head has the server's last layer plus one row added to each class's."""
    on = two_parts(norm=False)
    head = copy.deepcopy(on.model.server)  # type: ignore[union-attr]
    with torch.no_grad():
        head[1].weight.add_(torch.arange(8.0))
    shifted = Split(on.model.client, on.model.server, head)  # type: ignore[union-attr, arg-type]
    sage = FslSage(lr=0.1, local_steps=1, server_lr=1e-30, align_epochs=1, auxiliary_lr=1e-30)
    methods = sage, SplitFedV1(lr=0.1, local_steps=1)
    a, b = (part(run(m, shifted, rounds=1).state["params"], "client") for m in methods)
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], atol=1e-7, rtol=0)


def test_i10_a_full_batch_alignment_of_small_steps_descends() -> None:
    torch.manual_seed(2)
    client, server = nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    on = Split(client, server, nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3)))
    method = FslSage(align_epochs=1, auxiliary_optimizer="sgd", auxiliary_lr=0.05)
    fleet: Any = SimpleNamespace(memory={}, round=1, rounds=1, seed=0, task=on)
    aligner = Aligner(method, fleet, method.server(fleet, on.server_part.init()), method.init(on))
    aligner.remember(Reply(0, {"cut": {"0": torch.randn(40, 8)}, "labels": {"0": torch.randint(3, (40,))}}, 40, {}))
    cut, y = fleet.memory[0]["cut"], fleet.memory[0]["labels"]
    truth = aligner._slope(aligner.server, cut, y, (0,), again=True)

    def misfit() -> float:
        held = fleet.memory[0].get("auxiliary") or aligner.state["auxiliary"]
        head = method.head(on, {"auxiliary": held}, "test", "cpu")
        return float((aligner._slope(head, cut, y, (0,), again=True) - truth).square().sum())

    seen = [misfit()]
    for _ in range(20):
        aligner.align(0)
        seen.append(misfit())
    assert all(after < before for before, after in itertools.pairwise(seen))


def test_i13_the_mean_is_convex_and_keeps_what_is_equal() -> None:
    rng = torch.Generator().manual_seed(0)
    x = {"w": torch.zeros(5), "n": torch.zeros((), dtype=torch.int64)}

    def mean(trees: list[tree.Tree], examples: list[int], combine: Any = weighted_mean()) -> tree.Tree:
        replies = [Reply(c, {"delta": t}, n, {}) for c, (t, n) in enumerate(zip(trees, examples, strict=True))]
        return reduce(replies, delta=combine.over(x))["delta"]

    trees = [{"w": torch.randn(5, generator=rng), "n": torch.tensor(c + 1)} for c in range(4)]
    found = mean(trees, [1, 2, 3, 4])
    stacked = torch.stack([t["w"] for t in trees])
    assert (stacked.min(0).values <= found["w"]).all() and (found["w"] <= stacked.max(0).values).all()
    assert found["n"].dtype is torch.int64 and int(found["n"]) == (1 + 4 + 9 + 16) // 10
    assert_same_state(mean([trees[0]] * 4, [5, 5, 5, 5]), trees[0])  # powers of two: exactly
    torch.testing.assert_close(mean(trees[::-1], [4, 3, 2, 1])["w"], found["w"], atol=1e-6, rtol=0)
    ten = mean([trees[0]] * 10, [1] * 10, uniform_mean())["w"]
    assert math.isclose(sum([0.1] * 10), 1.0)
    torch.testing.assert_close(ten, trees[0]["w"], atol=1e-6, rtol=0)


def test_i14_each_end_leaves_the_other_alone() -> None:
    """A server that does not move while the device does, and the other way round."""
    on = two_parts(norm=False)
    first: dict[str, Tensor] = on.init()["params"]
    device = run(SplitFedV1(lr=0.1, server_lr=1e-30), on, rounds=1).state["params"]
    server = run(SplitFedV1(lr=1e-30, server_lr=0.1), on, rounds=1).state["params"]
    for moved, still, ends in (("client", "server", device), ("server", "client", server)):
        assert_same_state(part(ends, still), part(first, still))
        assert all(not torch.equal(x, first[n]) for n, x in part(ends, moved).items())
