"""Names resolve to ours, to a user's file or module, or to an entry point; the rest is refused by the nearest name."""

import importlib.metadata
import pickle
import subprocess
import sys

import pytest

from lilliput.core.registry import group, nearest, normal, resolve


@pytest.fixture(autouse=True)
def own_search_path(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])


KNOWN = {"fedavg": 1, "fed_prox": 2, "ResNet-18": 3}


@pytest.mark.parametrize(
    ("name", "value"),
    [("fedavg", 1), ("FedAvg", 1), ("fed-avg", 1), ("FEDPROX", 2), ("resnet18", 3), ("Res_Net-18", 3)],
)
def test_case_dashes_and_underscores_do_not_matter(name, value):
    assert resolve("algorithm", name, KNOWN) == value


def test_an_unknown_name_is_refused_by_the_nearest():
    with pytest.raises(ValueError, match="unknown algorithm 'fedagv'; did you mean 'fedavg'") as refusal:
        resolve("algorithm", "fedagv", KNOWN)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="choose one of ResNet-18, fed_prox, fedavg"):
        resolve("algorithm", "qqqq", KNOWN)
    assert nearest("x", []) == "there are none"


def test_a_users_file_is_found_and_loaded_once(tmp_path):
    file = tmp_path / "mine_once.py"
    file.write_text("class Thing:\n    pass\n")
    thing = resolve("model", f"{file}:Thing", {})
    assert thing is resolve("model", f"{file}:Thing", {})


def test_a_file_of_the_same_name_elsewhere_is_another(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine_twice.py").write_text(f"thing = '{folder}'")
    assert [resolve("model", f"{tmp_path}/{f}/mine_twice.py:thing", {}) for f in "aba"] == ["a", "b", "a"]


def test_a_users_class_can_be_pickled_and_read_by_another_process(tmp_path):
    file = tmp_path / "mine_pickled.py"
    file.write_text("class Thing:\n    value = 7\n")
    data = pickle.dumps(resolve("model", f"{file}:Thing", {})())
    read = f"import sys, pickle; sys.path = {sys.path!r}; print(pickle.loads({data!r}).value)"
    assert subprocess.run([sys.executable, "-c", read], capture_output=True, text=True).stdout == "7\n"


def test_an_import_path_is_followed():
    assert resolve("model", "collections.abc:Mapping", {}) is importlib.import_module("collections.abc").Mapping


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.py:Thing", "there is no file '.*nowhere.py' to take the model from"),
        ("no_such_package.module:Thing", "module 'no_such_package.module' of the model does not import"),
        ("collections:Countre", "collections has no 'Countre'; did you mean 'Counter'"),
        (":Thing", "write file.py:Name"),
        ("mine.py:", "write file.py:Name"),
    ],
)
def test_what_a_user_names_wrongly_is_named_back(name, message):
    with pytest.raises(ValueError, match=message):
        resolve("model", name, {})


def test_a_file_may_not_hide_a_library(tmp_path):
    (tmp_path / "json.py").write_text("Thing = 1")
    with pytest.raises(ValueError, match=r"json\.py has the name of another module, 'json'; rename the file"):
        resolve("model", f"{tmp_path}/json.py:Thing", {})


def test_a_folder_of_the_same_name_is_no_library(tmp_path, monkeypatch):
    (tmp_path / "elsewhere" / "a_run").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    (tmp_path / "a_run.py").write_text("Thing = 1")
    assert resolve("model", f"{tmp_path}/a_run.py:Thing", {}) == 1


def test_a_file_that_fails_says_how_and_may_be_mended(tmp_path):
    file = tmp_path / "mine_broken.py"
    file.write_text("thing = 1 / 0")
    with pytest.raises(ValueError, match="does not load: ZeroDivisionError"):
        resolve("model", f"{file}:thing", {})
    file.write_text("thing = 1 / 2  # mended")
    assert resolve("model", f"{file}:thing", {}) == 0.5


def test_entry_points_of_installed_packages_are_names_too(monkeypatch):
    point = importlib.metadata.EntryPoint("Theirs-Net", "collections:Counter", "lilliput.models")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] if group == point.group else [])
    assert resolve("model", "theirs_net", {}) is importlib.import_module("collections").Counter
    with pytest.raises(ValueError, match="did you mean 'Theirs-Net'"):
        resolve("model", "theirsnett", {})


def test_groups_are_plurals():
    assert [group(kind) for kind in ("model", "loss")] == ["lilliput.models", "lilliput.losses"]
    assert normal("Fed-Avg_M") == "fedavgm"
