"""Tests of checkpoints: complete or skipped, at most the given number, without executable content."""

import errno
import json
import pickle
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pi0fm.train.checkpoint import index as checkpoint_index
from pi0fm.train.checkpoint import storage
from pi0fm.train.checkpoint.checkpoints import Checkpoints
from pi0fm.train.checkpoint.storage import whole
from pi0fm.train.parallel.accelerate import Parallel
from pi0fm.train.parallel.context import Context
from pi0fm_client.errors import ConfigError, OutputError

ALONE = Parallel(Context())
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"model/weight": torch.full((3,), value), "moments/step": torch.tensor(value)}


def accept(index: checkpoint_index.Index) -> None:
    assert index.facts["note"] == "a"


@pytest.fixture
def run(tmp_path):
    """`run(keep=2)`: the checkpoints of a run in `tmp_path`, as one more process of it would see them."""
    made = []

    def opened(keep: int = 9) -> Checkpoints:
        made.append(Checkpoints(tmp_path, ALONE, keep))
        return made[-1]

    yield opened
    for checkpoints in made:
        checkpoints.close()


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, tensors(float(step)), {"note": "a", "step": step})
    checkpoints.settle()


def restored(checkpoints: Checkpoints) -> float | None:
    """The value that every tensor was given, or None where there was no checkpoint."""
    target = tensors(0.0)
    weight = target["model/weight"]
    found = checkpoints.restore(target, accept)
    if found is None:
        return None
    assert weight.tolist() == [float(target["moments/step"])] * 3
    assert found.facts["step"] == float(weight[0]) == checkpoints.saved
    return float(weight[0])


def test_round_trip_in_place_of_every_type(run):
    random = torch.Generator().manual_seed(0)
    kept = {str(kind): (torch.randn(3, 5, generator=random) * 9).to(kind) for kind in TYPES}
    kept |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "strided": torch.arange(12.0).reshape(3, 4).T}
    run().save_now(1, kept, {"note": "a", "nested": {"a": [1, None, "b"]}})
    found = {name: torch.zeros_like(tensor) for name, tensor in kept.items()}
    places = {name: tensor.data_ptr() for name, tensor in found.items()}
    index = run().restore(found, accept)
    assert index is not None
    assert index.facts["nested"] == {"a": [1, None, "b"]}
    for name, tensor in kept.items():
        assert torch.equal(found[name], tensor)
        assert found[name].data_ptr() == places[name]


def test_what_is_saved_is_the_state_of_its_moment(run, monkeypatch):
    """The files are written while training changes the tensors; the copy that was taken is not."""
    gate, real = threading.Event(), storage.Folder.write

    def slow(self, name, parts):
        assert gate.wait(20)
        real(self, name, parts)

    monkeypatch.setattr(storage.Folder, "write", slow)
    state, checkpoints = tensors(1.0), run()
    checkpoints.save(1, state, {"note": "a", "step": 1})
    for tensor in state.values():
        tensor.fill_(7.0)
    assert checkpoints.settle(wait=False) is None
    assert checkpoints.saved is None
    gate.set()
    checkpoints.settle()
    assert checkpoints.saved == 1
    assert restored(run()) == 1.0


def test_the_files_are_safetensors_and_json_and_nothing_else(run, tmp_path):
    save(run(), 5)
    folder = tmp_path / "step-000000005"
    assert sorted(path.name for path in folder.iterdir()) == ["COMMIT", "index.json", "rank-00000.safetensors"]
    assert load_file(folder / "rank-00000.safetensors")["model/weight"].tolist() == [5.0] * 3
    for name in ("COMMIT", "index.json"):
        assert json.loads((folder / name).read_text())["version"] == 1


def test_nothing_is_unpickled(run, monkeypatch):
    save(run(), 5)

    def refused(*arguments, **options):
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refused)
    assert restored(run()) == 5.0


def test_one_process_saves_and_loads_without_a_warning(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(run(), 1)
        assert restored(run()) == 1.0


def test_retention_keeps_the_newest(run, tmp_path):
    save(run(keep=2), 5, 10, 15, 1000)
    assert whole(tmp_path) == [15, 1000]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000015", "step-000001000"]


def test_a_course_that_was_left_does_not_push_out_the_new_one(run, tmp_path):
    """Checkpoint 10 was passed over as damaged; the run goes on from 5 and must not lose 7 to it."""
    save(run(), 5, 10)
    save(run(keep=1), 7)
    assert whole(tmp_path) == [7]


def damage_commit(folder: Path) -> str:
    (folder / "COMMIT").unlink()
    return "it has no COMMIT"


def cut_commit(folder: Path) -> str:
    (folder / "COMMIT").write_text((folder / "COMMIT").read_text()[:20])
    return "it is not readable"


def cut_shard(folder: Path) -> str:
    shard = folder / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    return "rank-00000.safetensors should hold"


def remove_shard(folder: Path) -> str:
    (folder / "rank-00000.safetensors").unlink()
    return "it holds 0"


def change_shard(folder: Path) -> str:
    shard = folder / "rank-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    return "does not hold what was written"


def change_index(folder: Path) -> str:
    index = folder / "index.json"
    index.write_text(index.read_text().replace('"note":"a"', '"note":"b"'))
    return "index.json does not hold what was written"


DAMAGE = (damage_commit, cut_commit, cut_shard, remove_shard, change_shard, change_index)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_torn_checkpoint_is_passed_over_with_a_warning_that_names_it(run, tmp_path, capsys, damage):
    save(run(), 5, 10)
    reason = damage(tmp_path / "step-000000010")
    assert restored(run()) == 5.0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert f"{tmp_path}/step-000000010 is torn" in said[0]
    assert reason in said[0]
    assert "passed over" in said[0]


def test_a_torn_one_is_written_anew_and_others_are_cleared_away(run, tmp_path):
    save(run(), 5)
    for step in (3, 8):
        (tmp_path / f"step-00000000{step}").mkdir()
        (tmp_path / f"step-00000000{step}/rank-00003.safetensors").write_text("half")
    save(run(), 8)
    assert sorted(path.name for path in (tmp_path / "step-000000008").iterdir()) == ["COMMIT", "index.json", "rank-00000.safetensors"]
    assert not (tmp_path / "step-000000003").exists()
    assert restored(run()) == 8.0


def test_nothing_there(run, tmp_path):
    assert restored(run()) is None
    assert whole(tmp_path / "missing") == []


def test_a_run_whose_only_checkpoint_is_found_damaged_does_not_begin_with_half_of_it(run, tmp_path):
    save(run(), 5)
    change_shard(tmp_path / "step-000000005")
    with pytest.raises(OutputError, match=r"no checkpoint in .* can be read whole; remove it to start the run again"):
        restored(run())


@pytest.mark.parametrize("change", ["shape", "name"])
def test_another_network_is_refused_by_the_tensor_that_differs(run, change):
    save(run(), 5)
    other = tensors(0.0)
    other["model/weight" if change == "shape" else "model/bias"] = torch.zeros(4)
    name = "model/weight is (3,), here it is (4,)" if change == "shape" else "model/bias is not there, here it is (4,)"
    with pytest.raises(OutputError) as caught:
        run().restore(other, accept)
    assert name in str(caught.value)


def fill_disk(monkeypatch, after: int) -> None:
    """Writes fail from the `after`-th on, as on a disk without room."""
    real, calls = storage.Folder.write, iter(range(after))

    def write(self, name, parts):
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, name, parts)

    monkeypatch.setattr(storage.Folder, "write", write)


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_training_goes_on(run, tmp_path, monkeypatch, capsys, written):
    checkpoints = run()
    save(checkpoints, 5)
    with monkeypatch.context() as patch:
        fill_disk(patch, written)
        checkpoints.save(10, tensors(10.0), {"note": "a", "step": 10})
        assert "No space left" in str(checkpoints.settle())
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "checkpoint of step 10" in said[0]
    assert "the one of step 5 stays" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000005"]
    save(checkpoints, 15)
    assert whole(tmp_path) == [5, 15]


def test_a_full_disk_where_the_run_must_be_saved_is_named(run, monkeypatch):
    checkpoints = run()
    save(checkpoints, 5)
    fill_disk(monkeypatch, 1)
    with pytest.raises(OutputError, match=r"checkpoint of step 10 .* could not be written \(.*No space left.*\); the one of step 5 stays"):
        checkpoints.save_now(10, tensors(10.0), {"note": "a", "step": 10})


def test_saving_at_once_what_is_saved_does_nothing(run, tmp_path):
    checkpoints = run()
    save(checkpoints, 5)
    before = (tmp_path / "step-000000005/COMMIT").stat().st_mtime_ns
    checkpoints.save_now(5, tensors(6.0), {"note": "a", "step": 5})
    assert (tmp_path / "step-000000005/COMMIT").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree["tensors"]["model/weight"]["boxes"][0].update(file="../../secret"), "a box is at"),
        (lambda tree: tree["tensors"]["model/weight"]["boxes"][0].update(stop=10**12), "a box is at"),
        (lambda tree: tree["tensors"]["model/weight"]["boxes"][0].update(offset=[1]), "a box of"),
        (lambda tree: tree["tensors"]["model/weight"]["boxes"][0].update(shape=[2]), "bytes for"),
        (lambda tree: tree["tensors"]["model/weight"].update(boxes=[]), "do not fill"),
        (lambda tree: tree["tensors"]["model/weight"].update(dtype="P8"), "not readable"),
        (lambda tree: tree.update(version=9), "version 9"),
    ],
)
def test_an_index_that_someone_wrote_is_checked_number_by_number(run, tmp_path, capsys, change, words):
    """Sums that agree are no reason to believe it."""
    import zlib

    save(run(), 5)
    folder = tmp_path / "step-000000005"
    tree = json.loads((folder / "index.json").read_text())
    change(tree)
    content = json.dumps(tree).encode()
    (folder / "index.json").write_bytes(content)
    commit = json.loads((folder / "COMMIT").read_text())
    commit["files"]["index.json"], commit["index_crc32"] = len(content), zlib.crc32(content)
    (folder / "COMMIT").write_text(json.dumps(commit))
    assert restored(run()) is None
    assert words in capsys.readouterr().err


def test_an_address_without_a_bucket_is_refused():
    with pytest.raises(ConfigError, match="s3://BUCKET/PREFIX, found 's3://'"):
        storage.open_store("s3://")


def test_a_folder_shows_a_name_whole_or_not_at_all(tmp_path):
    store = storage.Folder(tmp_path / "deep")
    assert store.sizes() == {}
    store.write("a/b", [memoryview(b"abc"), memoryview(b""), memoryview(b"defg")])
    assert bytes(store.read("a/b")) == b"abcdefg"
    assert bytes(store.read("a/b", 2, 5)) == b"cde"
    assert bytes(store.read("a/b", 5, 99)) == b"fg"
    assert store.sizes() == {"a/b": 7}
    with pytest.raises(TypeError):
        store.write("a/b", [memoryview(b"new"), "no bytes"])
    assert store.sizes() == {"a/b": 7}
    assert bytes(store.read("a/b")) == b"abcdefg"
    store.remove(["a/b", "a/missing"])
    assert list((tmp_path / "deep").iterdir()) == []
    with pytest.raises(FileNotFoundError):
        store.read("a/b")
