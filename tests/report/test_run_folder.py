import json

import pytest
from reported import rows, write

from folders import snapshot
from lilliput.experiment.checkpoint import CheckpointError
from lilliput.experiment.logs import Log
from lilliput.report.runs import Target, find, reached, read, series


def test_a_run_reads_back_with_its_settings_flat(tmp_path):
    made = rows([0.1, 0.2])
    run = read(write(tmp_path / "a", made, {"algorithm": "fedprox", "fedprox": {"mu": 0.1}}))
    assert run.rows == made
    assert run.config == {"algorithm": "fedprox", "fedprox.mu": 0.1}
    assert run.environment["data"] == "d" and run.notes == ()


def test_a_run_from_python_needs_rows_alone(tmp_path):
    run = read(write(tmp_path / "a", rows([0.5]), config=None, data=None))
    assert run.config == {} and run.environment == {}


def test_costs_are_sums_of_the_rounds_until_the_evaluation():
    made = [{"round": 0, "accuracy": 0.1}, *rows([None, 0.4, None, 0.6])]
    assert series(made, "accuracy", "rounds") == ([0, 2, 4], [0.1, 0.4, 0.6])
    assert series(made, "accuracy", "mb") == ([0.0, 2 * (2 + 3), 4 * (2 + 3)], [0.1, 0.4, 0.6])
    assert series(made, "accuracy", "seconds") == ([0.0, 20.0, 40.0], [0.1, 0.4, 0.6])


def test_what_is_not_finite_is_no_point_of_a_curve():
    assert series([{"round": 1, "loss": float("nan")}, {"round": 2, "loss": 1.0}], "loss") == ([2], [1.0])


def test_a_target_is_reached_in_the_first_round_that_meets_it():
    made = rows([0.2, 0.5, 0.4, 0.7])
    assert reached(made, Target("accuracy", 0.5)) == {"rounds": 2, "mb": 2 * 5.0, "gb": 0.01, "seconds": 20.0}
    assert reached(made, Target("accuracy", 0.8)) is None
    assert reached([{"round": 1, "loss": 2.0}, {"round": 2, "loss": 0.5}], Target("loss", 0.5, False))["rounds"] == 2


@pytest.mark.parametrize(
    ("text", "metric", "expected"),
    [
        ("accuracy>=0.9", None, Target("accuracy", 0.9)),
        ("loss <= 0.5", None, Target("loss", 0.5, at_least=False)),
        ("clients/accuracy>=9e-1", "loss", Target("clients/accuracy", 0.9)),
        (0.9, "accuracy", Target("accuracy", 0.9)),
        ("0.5", "loss", Target("loss", 0.5, at_least=False)),
    ],
)
def test_targets_as_they_are_written(text, metric, expected):
    assert Target.parse(text, metric) == expected


@pytest.mark.parametrize("text", ["accuracy", "accuracy>0.9", "accuracy 0.9", "accuracy>=1.2.3", "0.9"])
def test_what_is_no_target_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"accuracy>=0\.9"):
        Target.parse(text)


def test_a_half_written_last_line_is_left_out_and_noted(tmp_path):
    folder = write(tmp_path / "a", rows([0.1, 0.2]))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"round": 3, "accu')
    run = read(folder)
    assert [row["round"] for row in run.rows] == [1, 2]
    assert run.notes == (f"{folder / 'metrics.jsonl'}: the last line is half-written and was ignored",)


def test_a_round_that_was_run_again_counts_once(tmp_path):
    first, second = rows([0.1, 0.2, 0.3]), rows([0.1, 0.25])[1:]
    run = read(write(tmp_path / "a", first + second))
    assert [row["accuracy"] for row in run.rows] == [0.1, 0.25, 0.3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no round; wait for the first"),
        (b'{"round": 1', "holds no round"),
        (
            b'{"round": 1}\nnonsense\n{"round": 2}\n',
            "line 2 is damaged .not JSON.; restore the file and delete nothing",
        ),
        (b'{"round": 1}\n[1]\n', "line 2 is damaged"),
        (b'{"accuracy": 1}\n', "line 1 is damaged"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_damaged_metrics_name_their_file_and_the_remedy_in_one_line(tmp_path, content, message):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path)
    assert str(tmp_path / "metrics.jsonl") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("done", range(5))
@pytest.mark.parametrize("damaged", range(1, 5))
def test_what_is_said_of_a_damaged_line_is_true_and_nothing_is_touched(tmp_path, done, damaged):
    """It says that `lilliput resume` helps only where the checkpoint has not done the round: then it does, else not."""
    folder = write(tmp_path / "run", rows([0.1, 0.2, 0.3, 0.4]))
    (folder / "checkpoint").mkdir()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([*lines[: damaged - 1], "nonsense\n", *lines[damaged:]]))
    before = snapshot(folder)
    with pytest.raises(ValueError, match=f"line {damaged} is damaged.*restore the file and delete nothing.*only where"):
        read(folder)
    try:
        log = Log.of(folder / "metrics.jsonl", done)
        assert done < damaged and [row["round"] for row in log.rows] == list(range(1, done + 1))
    except CheckpointError as error:
        assert damaged <= done and "nothing was changed: restore the file" in str(error)
    assert snapshot(folder) == before


def test_an_empty_log_beside_a_checkpoint_is_not_to_be_deleted(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"holds no round; restore it$"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["config.yaml", "environment.json"])
@pytest.mark.parametrize("content", ["[1, 2]", "{", "a: b: c"])
def test_other_damaged_files_are_refused_by_name(tmp_path, name, content):
    folder = write(tmp_path / "a", rows([0.1]))
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        read(folder)


def test_runs_are_found_below_a_folder_and_only_once(tmp_path):
    runs = [write(tmp_path / name, rows([0.1])) for name in ("b/1", "a/2", "a/1")]
    assert find([tmp_path, tmp_path / "a"]) == sorted(runs)


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        find([tmp_path])
    with pytest.raises(ValueError, match="does not exist"):
        find([tmp_path / "nowhere"])


def test_rows_survive_what_json_writes_for_a_diverged_run(tmp_path):
    made = rows([0.1], loss=float("nan"))
    assert "NaN" in json.dumps(made)
    assert series(read(write(tmp_path / "a", made)).rows, "loss") == ([], [])
