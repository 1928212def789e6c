"""Settings from layers: names and aliases, nodes, what counts most, and what is refused with which words."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from lilliput.algorithms import ALGORITHMS
from lilliput.config import changed, expanded, flat, from_file, settings, words
from lilliput.config.aliases import RUN, meant
from lilliput.config.axes import AXES
from lilliput.config.build import make_algorithm
from lilliput.config.fields import docs, fields_of
from lilliput.config.published import FEDSUB, PRETRAINING, markdown
from lilliput.config.shared import NEUTRAL, top, training
from lilliput.core.registry import normal
from lilliput.models import MODELS

METHOD = """
from dataclasses import dataclass
from lilliput.algorithms import FedAvg

@dataclass(frozen=True)
class MyMethod(FedAvg):
    '''A method.

    depth: how deep
    '''
    depth: int = 3
    rate: float = {rate}
"""


def of(text: str, **more: Any) -> Any:
    return settings(words(text.split()), **more)


def test_every_name_of_every_axis_has_a_node() -> None:
    """`NAME.FIELD=value` is taken whichever names are chosen."""
    for axis in AXES.values():
        for choice in axis.nodes():
            for name, f in axis.fields(choice.target).items():
                read = settings({f"{choice.name}.{name}": f.default})
                assert read.as_dict().keys() >= top().keys(), f"{choice.name}.{name}"


def test_every_method_and_model_can_be_chosen_by_name() -> None:
    for method in ALGORITHMS:
        assert of(f"algorithm={method}").choices["algorithm"].target is ALGORITHMS[method]
    for model in MODELS:
        assert of(f"model={model}")["model"] == model


def test_no_node_has_the_name_of_a_setting() -> None:
    """`x=1` and `x.y=1` must not mean different things; Hydra's tree has one place for both."""
    names = {choice.name for axis in AXES.values() for choice in axis.nodes()}
    assert not names & top().keys()


def test_defaults_are_those_of_the_dataclasses() -> None:
    method = replace(make_algorithm(of(""), 10), optimizer_options={})  # which the node of SGD fills in
    assert method == ALGORITHMS["fedavg"]()
    for name, f in training().items():
        assert f.default == getattr(method, name)


def test_a_field_of_every_method_stands_at_the_top_and_no_other() -> None:
    common = set.intersection(*({f.name for f in fields(m)} for m in ALGORITHMS.values()))
    assert training().keys() == common - {"slice", "combine"}
    assert {"lr", "momentum", "local_epochs", "cohort", "optimizer", "buffers"} <= training().keys() <= top().keys()


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ("num_clients=20", "clients=20"),
        ("client_number=20", "clients=20"),
        ("comm_round=7", "rounds=7"),
        ("client_sample_ratio=0.2", "cohort=0.2"),
        ("client_sample_ratio=1.0", "cohort=null"),
        ("dataset.distribution=iid", "partition=iid"),
        (
            "dataset.distribution=noniid_dirichlet dataset.alpha=0.3",
            "partition=dirichlet_equal dirichlet_equal.alpha=0.3",
        ),
        ("dataset.distribution=iid dataset.alpha=10.0", "partition=iid"),
        ("partition_method=hetero partition_alpha=0.5", "partition=dirichlet partition.alpha=0.5"),
        ("partition_method=homo", "partition=iid"),
        (
            "alg=fedprox partition=noniid-labeldir beta=0.5 n_parties=10",
            "algorithm=fedprox partition=dirichlet clients=10",
        ),
        ("sample=0.1 epochs=5 rho=0.9 reg=1e-5", "cohort=0.1 local_epochs=5 momentum=0.9 weight_decay=1e-5"),
        ("epochs_client=5 wd=5e-4", "local_epochs=5 weight_decay=5e-4"),
        ("model.name=resnet20 dataset.name=cifar10 data_dir=d", "model=resnet20 dataset=cifar10 cifar10.folder=d"),
        ("dtype=bf16", "precision=bf16"),
        ("checkpoint_interval=5 save_dir_prefix=s", "checkpoint_every=5 folder=s"),
        ("algorithm=Fed-Avg", "algorithm=fedavg"),
        ("algorithm=fed_avg model=SimpleConv", "algorithm=fedavg model=simple_conv"),
        ("Num-Clients=20 LOCAL_EPOCHS=2", "clients=20 local_epochs=2"),
        ("fed-prox.MU=0.2 algorithm=FedProx", "fedprox.mu=0.2 algorithm=fedprox"),
        ("optimizer=Adam", "optimizer=adam"),
        ("algorithm=fedprox algorithm.mu=0.2", "algorithm=fedprox fedprox.mu=0.2"),
        ("algorithm=sl_multi_server", "algorithm=splitfed_v1"),
        ("algorithm=SL-Single-Server agg_factor=auto", "algorithm=splitfed_v2 combine=weighted_mean"),
        (
            "algorithm=fsl_sage algorithm.align_interval=5 model.auxiliary.max_dataset_size=500 cut=layer3",
            "algorithm=fsl_sage fsl_sage.align_interval=5 fsl_sage.memory_size=500 cut.at=layer3",
        ),
        (
            "algorithm=fsl_sage server_update_interval=3 cut.noise=0.1",
            "algorithm=fsl_sage cut=null fsl_sage.cut_noise=0.1 fsl_sage.server_update_interval=3",
        ),
        ("model=resnet20 model.norm=group", "model=resnet20 resnet20.norm=group"),
        (
            "optimizer=subscafsgd comp_dim=128 gene_method=ss tau=10 jump_certain_modules=[0,1] mixed_precision=bf16 "
            "model_config=configs/llama_60m.json ckpt=true constant_lr=true per_layer_weight_update=true grad_clip=0 "
            "measure_comm=true adaptive_cp_rate=0 momentum=0.9 dampening=0.5",
            "algorithm=fedsub fedsub.rank=128 fedsub.projection=ss local_steps=10 fedsub.skip=[0,1] precision=bf16 "
            "model=llama_60m checkpointing=true schedule=constant per_layer=true clip=null profile=comm momentum=0.9 "
            "sgd.dampening=0.5",
        ),
        (
            "optimizer=SubScafSGD adaptive_cp_rate=0.7 constant_lr=false warmup=100 mixed_precision=None "
            "measure_all=false flash_attn=true model=llama_9m dataset=corpus max_length=512",
            "algorithm=fedsub fedsub.rank=0.7 schedule=cosine warmup=100 precision=float32 model=llama_9m "
            "llama_9m.attention=flash_attention_2 dataset=corpus corpus.length=512",
        ),
        ("optimizer=fedavgsgd flash_attn=false model=llama_9m", "algorithm=fedavg optimizer=sgd model=llama_9m"),
        ("optimizer=sgd arch=resnet110 data_hete=true", "model=resnet110 partition=class_blocks"),
        ("data_hete=false grad_clip=1 use_wandb=false", "partition=iid clip=1"),
        ("lr=0.1 lr=0.2", "lr=0.2"),
        ("algorithm=scaffold lr=0.3 scaffold.lr=0.2", "algorithm=scaffold lr=0.2"),
    ],
)
def test_other_words_for_the_same_settings(published: str, ours: str) -> None:
    assert of(published).as_dict() == of(ours).as_dict()
    assert of(published).fingerprint() == of(ours).fingerprint()


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("algoritm=fedavg", "no setting 'algoritm'; did you mean 'algorithm'"),
        ("local_epoch=2", "did you mean 'local_epochs'"),
        ("num_client=2", "did you mean 'num_clients'"),
        ("algorithm=fedprocks", "algorithm 'fedprocks'; did you mean 'fedprox'"),
        ("model=resnet21", "did you mean 'resnet"),
        ("dataset=cifar11", "did you mean 'cifar1"),
        ("partition=dirichelt", "did you mean 'dirichlet'"),
        ("codec=bf15", "did you mean 'bf16'"),
        ("engine=worker", "did you mean 'workers'"),
        ("optimizer=adamv", "did you mean 'adam"),
        ("loss=crossentropie", "did you mean 'cross_entropy'"),
        ("recipe=fedavg/cifar_cnn", "did you mean 'fedavg/cifar10_cnn'"),
        ("fedprx.mu=1", "no 'fedprx' to set; did you mean 'fedprox'"),
        ("scaffold.serverlrr=1", "did you mean 'server_lr'"),
        ("fedprox.nu=1", "did you mean 'mu'|there is compat, mu"),
        ("mu=1", "write fedprox.mu or moon.mu"),
        ("alpha=0.5", "write dirichlet.alpha or"),
        ("fedprox=1", "write algorithm=fedprox, or fedprox.SETTING"),
        ("partition=iid partition.alpha=1", "partition=iid has no 'alpha'; it is a setting of dirichlet"),
        ("lr.x=1", "lr has no parts"),
        ("evaluate=servr", "one of server, clients, both, none"),
        ("rounds=two", "rounds=two must be a whole number"),
        ("rounds=1,2", "is a sweep; add -m"),
        ("rounds", "write key=value"),
        ("~rounds=1", "write key=value"),
        ("algorithm=local_only slice=full", "local_only has no 'slice'"),
        ("optimizer=subscafsgd tau=10 update_cp_freq=50", "write fedsub.refresh=..., in rounds: update_cp_freq / tau"),
        ("num_training_steps=20000", "write rounds=..., num_training_steps / tau"),
        ("total_batch_size=32", "write batch_size=..., a client's whole batch"),
        ("use-tqdm=true", "leave it out"),
    ],
)
def test_what_is_unknown_is_refused_with_the_nearest(typed: str, answer: str) -> None:
    with pytest.raises(ValueError, match=answer):
        expanded(words(typed.split()))


@pytest.mark.parametrize("name", ["heterofl", "fedrolex", "scalefl", "heteroavg", "raffm"])
def test_a_method_to_come_is_named_as_such(name: str) -> None:
    if name in ALGORITHMS:
        pytest.skip(f"{name} has come")
    with pytest.raises(ValueError, match="is not in this version yet; there is fedavg"):
        of(f"algorithm={name}")


def test_a_cut_is_a_setting_of_split_methods_alone() -> None:
    s = of("algorithm=fsl_sage cut=layer2 auxiliary.depth=2")
    assert s.as_dict()["cut"]["at"] == "layer2" and s.nodes["auxiliary"]["depth"] == 2 and not s.notes
    assert "auxiliary" not in of("algorithm=splitfed_v1").as_dict()
    plain = of("cut=layer2 cut.tied=sync align_interval=3")
    assert "cut" not in plain.as_dict() and plain.fingerprint() == of("").fingerprint()
    assert plain.notes["cut.at"] == "cut.at does nothing here: algorithm is fedavg"
    assert of("algorithm=splitfed_v1 auxiliary.depth=2").notes.keys() == {"auxiliary.depth"}
    for typed, answer in (
        ("cut.memry=1MB", "cut has no setting 'memry'; did you mean 'memory'"),
        ("cut.tied=loose", "cut.tied=loose must be one of untie, frozen, sync"),
        ("agg_factor=0.5", "agg_factor=0.5 is not auto"),
    ):
        with pytest.raises(ValueError, match=answer):
            of(f"algorithm=fsl_sage {typed}")


def test_settings_read_again_are_the_same(tmp_path: Path) -> None:
    typed = "algorithm=fedprox fedprox.mu=0.1 model=resnet20 partition=dirichlet optimizer=adam adam.eps=1e-5 clip=1"
    first = of(typed + " optimizer_options.betas=[0.5,0.9] device_profile.up_bps=1e6 augment=[crop:4,flip] cohort=0.1")
    again = settings(flat(first.as_dict()))
    assert again.as_dict() == first.as_dict() and again.fingerprint() == first.fingerprint() and not again.notes
    import yaml

    (tmp_path / "c.yaml").write_text(yaml.safe_dump(first.as_dict()))
    assert settings(from_file(tmp_path / "c.yaml")).fingerprint() == first.fingerprint()


def test_a_published_file_of_sizes_is_a_name_unless_it_is_here(tmp_path: Path) -> None:
    (tmp_path / "llama_60m.json").write_text("{}")
    with pytest.raises(ValueError, match=r"write model=pretrained pretrained.source=.*llama_60m.json"):
        settings({"model_config": str(tmp_path / "llama_60m.json")})


@pytest.mark.parametrize(("options", "ticks"), [(FEDSUB, True), (PRETRAINING, False)], ids=["fedsub", "pretraining"])
def test_the_readme_has_the_tables_of_published_options(options: Any, ticks: bool) -> None:
    assert markdown(options, ticks) in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_every_published_option_stands_for_a_setting_or_is_refused_with_its_note() -> None:
    nodes = [name for axis in AXES.values() for choice in axis.nodes() for name in axis.fields(choice.target)]
    for key, (option, ours) in RUN.items():
        first, _, rest = ours.partition(".")
        if option.kind == "refused":
            with pytest.raises(ValueError, match=re.escape(option.said())):
                meant(key, 1)
        else:
            assert first in {*top(), "fedsub", "cut"} and rest in {"", "at", *nodes}, key


def test_no_published_key_is_one_of_ours() -> None:
    assert not {normal(key) for key in RUN} & {normal(key) for key in top()}


def test_later_layers_count_more(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("clients: 50\nlr: 1e-3\nfedprox: {mu: 0.5}\nalgorithm: fedprox\n")
    s = settings(from_file(file), words(["num_clients=20"]))
    assert (s["clients"], s["lr"], s.node("algorithm")["mu"]) == (20, 0.001, 0.5)
    assert changed(s, {"algorithm.mu": 0.25}).node("algorithm")["mu"] == 0.25


def test_a_recipe_lies_below_what_is_typed() -> None:
    (s,) = expanded(words(["recipe=fedavg/cifar10_cnn", "num_clients=50"]))
    assert (s["clients"], s["model"], s["cohort"], s["case"]) == (50, "cnn", 10, "FedAvg")
    assert s.node("partition") == {"alpha": 0.5, "min_size": 10}


def test_the_fingerprint_is_of_what_decides_numbers() -> None:
    first = of("").fingerprint()
    for key in NEUTRAL:
        value = {"checkpoint_every": 3, "scale": "small"}.get(key, not top()[key].default)
        assert (
            settings({key: value if not isinstance(value, bool) or top()[key].hint is bool else "x"}).fingerprint()
            == first
        )
    for text in ("seed=1", "lr=0.2", "model=cnn", "engine=sequential", "partition=iid", "fedavg.compat=official"):
        assert of(text).fingerprint() != first, text
    assert of("fedprox.mu=0.7").fingerprint() == first  # nothing of another method


def test_a_setting_of_another_method_is_noted() -> None:
    assert of("fedprox.mu=0.7").notes == {"fedprox.mu": "fedprox.mu does nothing here: algorithm is fedavg"}
    assert not of("fedprox.mu=0.7 algorithm=fedprox").notes


def test_in_a_sweep_what_this_run_lacks_may_be_another_runs() -> None:
    s = of("algorithm=local_only slice=full partition=iid partition.alpha=1 my_method.beta=2", sweep=True)
    assert s.notes.keys() == {"slice", "partition.alpha", "my_method.beta"}


def test_a_method_of_a_users_own_has_a_node(tmp_path: Path) -> None:
    file = tmp_path / "own_method.py"
    file.write_text(METHOD.format(rate=0.1))
    s = settings({"algorithm": f"{file}:MyMethod", "my_method.depth": "5", "lr": 0.3})
    assert s.nodes["my_method"] == {"compat": None, "depth": 5, "rate": 0.1}
    method = make_algorithm(s, 10)
    assert (type(method).__name__, method.depth, method.lr) == ("MyMethod", 5, 0.3)
    with pytest.raises(ValueError, match=r"there is compat, depth, rate|did you mean 'depth'"):
        settings({"algorithm": f"{file}:MyMethod", "my_method.dept_": 5})


def test_a_changed_source_file_is_another_experiment(tmp_path: Path) -> None:
    prints = set()
    for rate in (0.1, 0.2):
        (tmp_path / "changing.py").write_text(METHOD.format(rate=rate))
        prints.add(settings({"algorithm": f"{tmp_path / 'changing.py'}:MyMethod", "my_method.rate": 0.5}).fingerprint())
    assert len(prints) == 2


@pytest.mark.parametrize("axis", ["algorithm", "model", "dataset", "partition", "loss", "codec", "optimizer", "engine"])
def test_every_axis_takes_a_path(axis: str, tmp_path: Path) -> None:
    file = tmp_path / f"own_{axis}.py"
    file.write_text("def thing(x, y=2):\n    return x\n")
    s = settings({axis: f"{file}:thing", "thing.y": 3})
    assert s.choices[axis].name == "thing" and s[axis] == f"{file}:thing" and s.node(axis) == {"y": 3}


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("nope.py:Mine", "no file"),
        ("lilliput.core.tree:Mine", "has no 'Mine'"),
        ("no.such.module:Mine", "does not import"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(path: str, answer: str) -> None:
    with pytest.raises(ValueError, match=answer):
        settings({"algorithm": path})


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("- 1\n- 2\n", "holds no settings"),
        ("a: [1\n", "no YAML"),
        ("\x00\xff", "no YAML"),
        (None, "no configuration file"),
    ],
)
def test_a_damaged_file_is_refused_by_name(text: str | None, answer: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=answer) as refused:
        from_file(file)
    assert str(file) in str(refused.value)


def test_fields_come_from_dataclasses_functions_and_partials() -> None:
    from functools import partial

    def make(shape: Any, *, width: int = 3, norm: str = "batch", **rest: Any) -> None: ...

    assert {n: f.default for n, f in fields_of(make).items()} == {"width": 3, "norm": "batch"}
    assert fields_of(partial(make, (1,), width=5))["width"].default == 5
    assert fields_of(ALGORITHMS["fedprox"])["mu"].hint is float


def test_the_words_of_a_field_go_on_over_the_lines_of_its_entry() -> None:
    class Thing:
        """A thing.

        width, height: of its front,
                       in pixels.
        mode: slow: by hand;
              fast: by machine.
        compat="official": as published.
        What follows belongs to no entry: none at all.
        """

        depth: int = 3  # how deep

    assert docs(Thing) == {
        "width": "of its front, in pixels.",
        "height": "of its front, in pixels.",
        "mode": "slow: by hand; fast: by machine.",
        "compat": "official: as published.",
        "depth": "how deep",
    }


def test_every_field_of_fedsub_is_told_whole() -> None:
    told = docs(ALGORITHMS["fedsub"])
    assert told["projection"].endswith("whenever P changes.") and told["dual"].endswith("none.")


@pytest.mark.parametrize(("axis", "group"), [("algorithm", "algorithms"), ("loss", "losses")])
def test_entry_points_of_other_packages_are_names_with_nodes(
    axis: str, group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from lilliput.cli.facts import facts
    from lilliput.config import axes

    (tmp_path / "foreign_package.py").write_text(METHOD.format(rate=0.1))
    metadata = tmp_path / "foreign_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[lilliput.{group}]\nfar_away = foreign_package:MyMethod\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "foreign_package", raising=False)
    axes._foreign.cache_clear()
    try:
        s = of(f"{axis}=FarAway far_away.depth=7")
        assert s[axis] == "far_away" and s.node(axis)["depth"] == 7
        chosen = "fedavg" if axis == "algorithm" else "cross_entropy"
        assert of("far_away.depth=7").notes == {
            "far_away.depth": f"far_away.depth does nothing here: {axis} is {chosen}"
        }
        assert settings(flat(s.as_dict())).fingerprint() == s.fingerprint()
        assert facts()["axes"][axis]["names"]["far_away"]["settings"]["depth"] == ["3", "how deep (a whole number)"]
    finally:
        axes._foreign.cache_clear()
