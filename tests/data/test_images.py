"""A data set is the same whatever format its files have, and files cannot run code."""

import gzip
import io
import os
import pickle
import struct

import numpy as np
import pytest
import torch

from lilliput.data import formats, hub, load

PNG = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return tmp_path / "cache"


def pixels(n, shape=(3, 32, 32), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def png(image):
    """The encoded bytes of a (C, H, W) image."""
    out = io.BytesIO()
    PNG.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(out, "png")
    return out.getvalue()


def write_parquet(file, x, y, columns=("img", "label"), **more):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    file.parent.mkdir(parents=True, exist_ok=True)
    blobs = [{"bytes": png(image), "path": f"{i}.png"} for i, image in enumerate(x)]
    pq.write_table(pa.table({columns[0]: blobs, columns[1]: y.tolist(), **more}), file)


def write_idx(file, array):
    content = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def write_cifar(home, x, y, tx, ty, protocol=2):
    home.mkdir(parents=True)
    for i in range(5):
        batch = {"data": x[i::5].reshape(-1, 3072), "labels": y[i::5].tolist()}
        (home / f"data_batch_{i + 1}").write_bytes(pickle.dumps(batch, protocol=protocol))
    (home / "test_batch").write_bytes(pickle.dumps({"data": tx.reshape(-1, 3072), "labels": ty.tolist()}, protocol))


def test_pickled_batches_and_parquet_are_one_data_set(tmp_path):
    x, y, tx, ty = pixels(20), np.arange(20) % 10, pixels(6, seed=1), np.arange(6)
    write_cifar(tmp_path / "a" / "cifar-10-batches-py", x, y, tx, ty)
    order = np.concatenate([np.arange(i, 20, 5) for i in range(5)])
    write_parquet(tmp_path / "b" / "train-0.parquet", x[order], y[order])
    write_parquet(tmp_path / "b" / "test-0.parquet", tx, ty)
    a, b = load("cifar10", tmp_path / "a"), load("cifar10", tmp_path / "b")
    assert torch.equal(a.train[0], torch.from_numpy(x[order])) and a.augment == ("crop:4", "flip")
    assert (
        a.fingerprint() == b.fingerprint() == load("cifar10", tmp_path / "b").fingerprint()
    )  # the last from the cache


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_batches_of_every_pickle_protocol_are_read(tmp_path, protocol):
    x = pixels(10)
    write_cifar(tmp_path / "c", x, np.arange(10), x[:2], np.arange(2), protocol)
    assert torch.equal(load("cifar10", tmp_path / "c").test[0], torch.from_numpy(x[:2]))


class Nasty:
    def __init__(self, call, *args):
        self.call = (call, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("nasty", [Nasty(os.system, "touch {}"), Nasty(eval, "open('{}', 'w')"), Nasty(np.load, "{}")])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, nasty):
    x = pixels(10)
    write_cifar(tmp_path / "c", x, np.arange(10), x[:2], np.arange(2))
    target = tmp_path / "ran"
    nasty.call = (nasty.call[0], tuple(arg.format(target) for arg in nasty.call[1]))
    (tmp_path / "c" / "data_batch_3").write_bytes(pickle.dumps({"data": nasty, "labels": []}))
    with pytest.raises(ValueError, match=r"data_batch_3 is not a CIFAR batch: it asks for .* which is not allowed"):
        load("cifar10", tmp_path / "c")
    assert not target.exists()


class Pointers:
    """An array whose dtype claims, by its flags, that objects are plain bytes: NumPy would follow them as pointers."""

    class Dtype:
        def __reduce__(self):
            return np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)

    def __reduce__(self):
        make = np.empty(0).__reduce__()[0]
        return make, (np.ndarray, (0,), b"b"), (1, (2, 3072), Pointers.Dtype(), False, b"A" * (8 * 2 * 3072))


@pytest.mark.parametrize("data", [Pointers(), np.zeros((2, 3072), "f8"), np.array([{}]), np.zeros((2, 3072), "i1,i1")])
def test_arrays_of_anything_but_bytes_are_refused(tmp_path, data):
    x = pixels(10)
    write_cifar(tmp_path / "c", x, np.arange(10), x[:2], np.arange(2))
    (tmp_path / "c" / "test_batch").write_bytes(pickle.dumps({"data": data, "labels": [0, 1]}, 2))
    with pytest.raises(ValueError, match="test_batch is not a CIFAR batch: it has arrays of something other than"):
        load("cifar10", tmp_path / "c")


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps({"labels": []}, 2)])
def test_a_damaged_batch_is_named(tmp_path, content):
    x = pixels(10)
    write_cifar(tmp_path / "c", x, np.arange(10), x[:2], np.arange(2))
    (tmp_path / "c" / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match="test_batch is not a CIFAR batch"):
        load("cifar10", tmp_path / "c")
    (tmp_path / "c" / "test_batch").unlink()
    with pytest.raises(ValueError, match="there is no test_batch in"):
        load("cifar10", tmp_path / "c")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("place", ["", "MNIST/raw"])
def test_idx_files_are_read_as_they_are_or_gzipped(tmp_path, suffix, place):
    x, y = pixels(7, (28, 28)), np.arange(7, dtype=np.uint8)
    home = tmp_path / place
    home.mkdir(parents=True, exist_ok=True)
    for side, cut in (("train", slice(5)), ("t10k", slice(5, 7))):
        write_idx(home / f"{side}-images-idx3-ubyte{suffix}", x[cut])
        write_idx(home / f"{side}-labels-idx1-ubyte{suffix}", y[cut])
    d = load("mnist", tmp_path)
    assert d.train[0].shape == (5, 1, 28, 28) and torch.equal(d.test[0][:, 0], torch.from_numpy(x[5:]))
    assert d.train[1].tolist() == list(range(5)) and d.train[1].dtype == torch.int64
    (home / f"t10k-images-idx3-ubyte{suffix}").write_bytes(b"no idx file")
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte.* cannot be read"):
        load("mnist", tmp_path)


def test_svhn_as_matlab_files_has_zero_for_its_label_ten(tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    x = pixels(4)
    for side in ("train", "test"):
        savemat(tmp_path / f"{side}_32x32.mat", {"X": x.transpose(2, 3, 1, 0), "y": np.array([[1], [10], [9], [5]])})
    d = load("svhn", tmp_path)
    assert torch.equal(d.train[0], torch.from_numpy(x)) and d.test[1].tolist() == [1, 0, 9, 5]


def test_a_folder_of_images_is_a_data_set(tmp_path):
    x = pixels(10, (3, 5, 7))
    for i, image in enumerate(x):
        file = tmp_path / "mine" / ("cat", "ant")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(image))
    d = load("image_folder", tmp_path / "mine", test_share=0.3)
    assert (len(d.train[0]), len(d.test[0]), d.classes, d.shape, d.name) == (7, 3, 2, (3, 5, 7), "mine")
    for images, labels in (d.train, d.test):
        for image, label in zip(images, labels, strict=True):
            i = next(i for i in range(10) if np.array_equal(x[i], image))
            assert int(label) == (i + 1) % 2  # classes by name: ant, cat
    assert load("image_folder", tmp_path / "mine", size=4, channels=1).shape == (1, 4, 4)
    for side in ("train", "test"):
        (tmp_path / "split" / side).mkdir(parents=True)
        os.symlink(tmp_path / "mine" / "cat", tmp_path / "split" / side / "cat")
    assert len(load("image_folder", tmp_path / "split").test[0]) == 5
    (tmp_path / "mine" / "cat" / "odd.png").write_bytes(png(pixels(1, (3, 6, 6))[0]))
    with pytest.raises(ValueError, match="set size to resize them"):
        load("image_folder", tmp_path / "mine")


def test_the_cache_keeps_what_files_say_and_nothing_else(tmp_path, cache, monkeypatch):
    x = pixels(3)
    for side in ("train", "test"):
        write_parquet(tmp_path / "p" / f"{side}-0.parquet", x, np.arange(3))
    first = load("cifar10", tmp_path / "p").fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(formats, "decoded", lambda *a: pytest.fail("decoded again"))
        assert load("cifar10", tmp_path / "p").fingerprint() == first
    (kept,) = [f for f in cache.rglob("train_x.npy")]
    kept.write_bytes(kept.read_bytes()[:100])  # damaged: made anew
    assert load("cifar10", tmp_path / "p").fingerprint() == first
    write_parquet(tmp_path / "p" / "train-0.parquet", x[::-1], np.arange(3))  # other files: other data
    assert load("cifar10", tmp_path / "p").fingerprint() != first
    assert not [f for f in cache.iterdir() if f.name.startswith(".new")]


def test_where_nothing_can_be_kept_the_data_are_read_all_the_same(tmp_path, monkeypatch):
    for side in ("train", "test"):
        write_parquet(tmp_path / "p" / f"{side}-0.parquet", pixels(3), np.arange(3))
    (tmp_path / "file").write_text("")
    for place in (str(tmp_path / "file" / "below"), ""):
        monkeypatch.setenv("LILLIPUT_CACHE", place)
        assert len(load("cifar10", tmp_path / "p").train[0]) == 3


def test_hugging_face_by_name(tmp_path, monkeypatch):
    """A folder in the hub's layout stands in for the hub."""
    pytest.importorskip("datasets")
    x, y = pixels(20, (1, 28, 28)), np.arange(20) % 10
    home = tmp_path / "femnist"
    writers = [f"w{i % 2}" for i in range(20)]
    write_parquet(home / "train-0.parquet", x, y, ("image", "character"), writer_id=writers)
    d = load("femnist", home)
    assert d.shape == (1, 28, 28) and (len(d.train[0]), len(d.test[0])) == (18, 2)
    assert d.test_owners.tolist() == [0, 1] and torch.equal(d.test[0], torch.from_numpy(x[18:]))
    assert d.owners.tolist() == [i % 2 for i in range(18)]
    write_parquet(home / "test-0.parquet", x[:4], y[:4], ("image", "character"), writer_id=["w1", "w1", "w0", "w2"])
    d = load("hub", path=str(home), owner="writer_id", channels=1)
    assert d.test_owners.tolist() == [1, 1, 0, 2] and torch.equal(d.train[0], torch.from_numpy(x))
    with pytest.raises(ValueError, match=r"cifar10 cannot be loaded .* go online or set dataset.folder"):
        monkeypatch.setattr("lilliput.data.images.IMAGE_SETS", {"cifar10": _elsewhere(tmp_path / "nowhere")})
        load("cifar10")


def _elsewhere(path):
    from lilliput.data.images import IMAGE_SETS

    return IMAGE_SETS["cifar10"]._replace(source=hub.Location(str(path)))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cifar10", {"folder": "nowhere"}, "there is no data folder 'nowhere'"),
        ("cifar10", {"folder": "."}, "does not hold cifar10: neither data_batch_1"),
        ("mnist", {"folder": "."}, "neither train-images-idx3-ubyte"),
        ("image_folder", {}, "image_folder needs dataset.folder"),
        ("hub", {}, "hub needs a path"),
    ],
)
def test_what_is_missing_is_said_with_the_remedy(name, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        load(name, **options)


def test_labels_of_another_data_set_are_refused(tmp_path):
    for side in ("train", "test"):
        write_parquet(tmp_path / f"{side}-0.parquet", pixels(3), np.array([1, 2, 10]))
    with pytest.raises(ValueError, match="labels 1 to 10 and 10 classes"):
        load("cifar10", tmp_path)
    write_parquet(tmp_path / "train-1.parquet", pixels(3), np.arange(3), ("picture", "label"))
    with pytest.raises(ValueError, match="must be called img or image"):
        load("cifar10", tmp_path)


def test_a_missing_package_names_the_line_that_installs_it():
    with pytest.raises(ValueError, match=r"needs Nothing; pip install 'lilliput\[run\]'"):
        formats.needs("no_such_module_at_all", "Nothing")


def test_fashion_mnist_and_cifar100_as_shared(shared):
    d = load("fashion-mnist", shared / "data" / "fashion-mnist")
    assert d.train[1].bincount().tolist() == [6000] * 10 and d.test[1].bincount().tolist() == [1000] * 10
    assert abs((d.train[0] / 255).mean() - d.mean[0]) < 1e-4 and abs((d.train[0] / 255).std() - d.std[0]) < 1e-4
    c = load("cifar100", shared / "data" / "cifar100")
    assert c.train[1].bincount().tolist() == [20] * 100 and c.test[1].bincount().tolist() == [5] * 100


@pytest.mark.slow
def test_cifar10_parquet_equals_the_original_batches(shared, tmp_path):
    import subprocess
    import sys

    subprocess.run([sys.executable, shared / "data" / "cifar10" / "unpack.py", tmp_path], check=True)
    a, b = load("cifar10", tmp_path), load("cifar10", shared / "data" / "cifar10")
    assert a.fingerprint() == b.fingerprint() == "d584c113330e539d"
    assert a.train[1].bincount().tolist() == [5000] * 10 and a.test[1].bincount().tolist() == [1000] * 10
    torch.testing.assert_close((a.train[0] / 255).mean((0, 2, 3)), torch.tensor(a.mean), rtol=0, atol=1e-3)
    torch.testing.assert_close((a.train[0] / 255).std((0, 2, 3)), torch.tensor(a.std), rtol=0, atol=1e-3)
