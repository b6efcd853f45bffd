from __future__ import annotations

import json
import logging
import math
import os
import stat
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.inprocess import same
from torchord.cache.errors import CheckpointError
from torchord.cache.files.checkpoint import CheckpointStore, runs_in
from torchord.cache.tensors.codec import layout, pack, views

TENSORS = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(4)}
STATE = {"optimizer": {"state": {0: {"m": torch.ones(2)}}, "lr": 0.1, "best": math.inf}, "scheduler": None}


@pytest.fixture(params=["directory", "file URL", "memory URL"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "memory URL":
        import fsspec

        name = f"/{uuid.uuid4().hex}"
        yield f"memory:/{name}"
        filesystem = fsspec.filesystem("memory")
        if filesystem.exists(name):
            filesystem.rm(name, recursive=True)
    else:
        yield f"file://{tmp_path}" if request.param == "file URL" else str(tmp_path)


@pytest.fixture
def store(root: str) -> CheckpointStore:
    return CheckpointStore(root, "run-1")


@pytest.fixture
def local(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(str(tmp_path), "run-1")


def damage(store: CheckpointStore, version: int, part: str = "tensors") -> None:
    """Flip one bit in the middle of a file."""
    suffix = ".json" if part == "marker" else f".{part}.safetensors"
    path = Path(store.path()) / f"version-{version:09d}{suffix}"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_figures_that_are_not_finite_are_saved(store: CheckpointStore) -> None:
    evaluations = {"3": {"loss": math.inf, "auroc": math.nan, "accuracy": 0.5}}
    store.save(3, TENSORS, STATE, {"evaluations": evaluations})
    assert store.latest_version() == 3
    assert repr(store.load(3).meta["evaluations"]) == repr(evaluations)
    assert store.load(3).state["optimizer"]["best"] == math.inf


def test_what_is_saved_is_loaded(store: CheckpointStore) -> None:
    nbytes = store.save(7, TENSORS, STATE, {"chain": "abc", "loss": 0.5})
    found = store.load(7)
    assert found.version == 7 and found.meta == {"chain": "abc", "loss": 0.5}
    assert list(found.tensors) == list(TENSORS)
    assert all(same(found.tensors[name], TENSORS[name]) for name in TENSORS)
    assert same(found.state["optimizer"]["state"][0]["m"], torch.ones(2))
    assert found.state["optimizer"]["best"] == math.inf and found.state["scheduler"] is None
    assert nbytes > 100


DTYPES = [
    value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype)
    and str(value) == f"torch.{name}"
    and not any(part in name for part in ("quint", "qint", "bits", "x2"))
    and not (name.startswith(("int", "uint")) and name.removeprefix("u")[3:] not in ("8", "16", "32", "64"))
]


# torch warns of its experimental dtypes, whatever one does with them.
@pytest.mark.filterwarnings("ignore:B?Complex(Half|32) support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape(local: CheckpointStore, dtype: torch.dtype) -> None:
    for shape in ((), (0,), (3,), (2, 0, 3), (4, 3)):
        numel = math.prod(shape)
        raw = torch.randint(0, 2, (numel * dtype.itemsize,), dtype=torch.uint8)
        tensor = raw.view(dtype).reshape(shape) if numel else torch.empty(shape, dtype=dtype)
        local.save(1, {"t": tensor}, {"t": tensor})
        found = local.load(1)
        assert same(found.tensors["t"], tensor) and same(found.state["t"], tensor)


def test_values_pass_through_no_arithmetic(local: CheckpointStore) -> None:
    bits = torch.tensor([0x7FC00001, -0x7FFFFFFF - 1, 1, 0x7F800000, -0x3FFFFF], dtype=torch.int64).to(
        torch.int32
    )
    tensors = {
        "f": bits.view(torch.float32),
        "c": torch.complex(bits[:4].view(torch.float32)[:2], torch.ones(2)),
    }
    local.save(1, tensors, {})
    assert all(same(local.load(1).tensors[name], tensor) for name, tensor in tensors.items())


def test_views_transposes_and_shared_memory(local: CheckpointStore) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": base.T, "row": base[1], "again": base[1], "wide": base[0, :1].expand(5), "base": base}
    local.save(1, tensors, {"same": base, "twice": base})
    found = local.load(1).tensors
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    flat = pack(TENSORS, layout(TENSORS))
    local.save(2, views(flat, layout(TENSORS)), {})
    assert all(same(local.load(2).tensors[name], TENSORS[name]) for name in TENSORS)


def test_parameters_that_require_grad_and_conjugates(local: CheckpointStore) -> None:
    value = torch.tensor([1 + 2j]).conj()
    local.save(1, {"p": torch.nn.Parameter(torch.ones(2)), "c": value}, {})
    found = local.load(1).tensors
    assert not found["p"].requires_grad and same(found["c"], value.resolve_conj())


def test_a_model_without_tensors(store: CheckpointStore) -> None:
    store.save(0, {}, {})
    assert store.load(0).tensors == {} and store.load(0).state == {}


def test_equal_content_gives_equal_files(local: CheckpointStore) -> None:
    found = []
    for _ in range(2):
        local.save(1, {f"t{n}": torch.full((n,), float(n)) for n in range(20)}, STATE)
        found.append({path.name: path.read_bytes() for path in Path(local.path()).iterdir()})
    assert found[0] == found[1]


def test_versions_are_listed_in_order(store: CheckpointStore) -> None:
    assert store.versions() == [] and store.latest() is None and store.latest_version() is None
    for version in (10, 2, 1_234_567_890_123):
        store.save(version, TENSORS, STATE)
    assert store.versions() == [2, 10, 1_234_567_890_123]
    found = store.latest()
    assert found is not None and found.version == 1_234_567_890_123 and found.skipped == ()
    assert store.latest_version() == 1_234_567_890_123
    assert store.latest_version(at_most=11) == 10
    assert store.latest_version(at_most=1) is None


def test_saving_a_version_again_replaces_it(store: CheckpointStore) -> None:
    store.save(1, TENSORS, STATE)
    store.save(1, {"w": torch.zeros(1)}, {})
    assert list(store.load(1).tensors) == ["w"]


@pytest.mark.parametrize("part", ["tensors", "state", "marker"])
def test_a_damaged_checkpoint_is_passed_over_and_reported(
    local: CheckpointStore, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    for version in (1, 2, 3):
        local.save(version, TENSORS, STATE)
    damage(local, 3, part)
    with pytest.raises(CheckpointError, match=r"version-000000003.*damaged"):
        local.load(3)
    with caplog.at_level(logging.WARNING):
        found = local.latest()
    assert found is not None and found.version == 2
    assert len(found.skipped) == 1 and "version 3" in found.skipped[0]
    assert "run-1" in caplog.text and "checkpoint 3 passed over" in caplog.text
    assert local.latest_version() == 2


def test_every_bit_of_the_marker_is_guarded(local: CheckpointStore) -> None:
    local.save(1, {"w": torch.ones(1)}, {"lr": 0.125}, {"chain": "c"})
    path = Path(local.path(1))
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(bytes(changed))
        with pytest.raises(CheckpointError):
            local.load(1)


def test_a_truncated_or_missing_file_is_damage(local: CheckpointStore) -> None:
    for version in (1, 2, 3, 4):
        local.save(version, TENSORS, STATE)
    folder = Path(local.path())
    (folder / "version-000000004.tensors.safetensors").unlink()
    state = folder / "version-000000003.state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    (folder / "version-000000002.json").write_text("")
    found = local.latest()
    assert found is not None and found.version == 1
    assert [text[:10] for text in found.skipped] == ["version 4:", "version 3:", "version 2:"]


def test_if_all_are_damaged_it_says_so(local: CheckpointStore) -> None:
    local.save(1, TENSORS, STATE)
    damage(local, 1)
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        local.latest()


def test_without_its_marker_a_checkpoint_does_not_exist(local: CheckpointStore) -> None:
    local.save(1, TENSORS, STATE)
    local.save(2, TENSORS, STATE)
    Path(local.path(2)).unlink()
    assert local.versions() == [1] and local.latest_version() == 1
    with pytest.raises(CheckpointError, match="version-000000002"):
        local.load(2)


def test_a_later_format_is_not_misread(local: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchord.cache.files.checkpoint

    monkeypatch.setattr(torchord.cache.files.checkpoint, "_FORMAT", 2)
    local.save(1, TENSORS, STATE)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"format 2.*reads 1"):
        local.load(1)


def test_pruning_keeps_the_newest(store: CheckpointStore) -> None:
    for version in (1, 2, 3, 4):
        store.save(version, TENSORS, STATE)
    store.save_spec({"a": 1})
    store.append_ledger(['{"version": 1}'])
    assert store.prune(2) == [1, 2]
    assert store.versions() == [3, 4]
    assert store.prune(9) == [] and store.prune(0) == [3]
    assert store.load(4).version == 4
    assert store.load_spec() == {"a": 1} and store.read_ledger() == ['{"version": 1}']
    assert not any(
        "00000001" in name or "00000003" in name for name in store._files.names() if "version" in name
    )


def test_pruning_sweeps_leavings_of_interrupted_saves_before_the_oldest_kept(local: CheckpointStore) -> None:
    for version in (1, 5, 9):
        local.save(version, TENSORS, STATE)
    Path(local.path(5)).unlink()  # as if the save had been killed before its marker
    assert local.prune(1) == [1]
    assert {p.name[:17] for p in Path(local.path()).iterdir()} == {"version-000000009"}


def test_pruning_leaves_a_version_0_alone_which_is_what_a_run_started_from(local: CheckpointStore) -> None:
    for version in (0, 3, 6, 9):
        local.save(version, TENSORS, STATE)
    assert local.prune(1) == [3, 6] and local.versions() == [0, 9]
    assert local.load(0).version == 0 and local.prune(1) == []


def test_pruning_leaves_a_save_under_way_alone(local: CheckpointStore) -> None:
    local.save(1, TENSORS, STATE)
    local.save(5, TENSORS, STATE)
    Path(local.path(5)).unlink()
    local.prune(1)
    assert (Path(local.path()) / "version-000000005.tensors.safetensors").exists()


@pytest.mark.parametrize("meta", [{"x": object()}, {"x": {1, 2}}, {"x": torch.ones(1)}])
def test_meta_must_be_plain(local: CheckpointStore, meta: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="meta"):
        local.save(1, TENSORS, STATE, meta)
    assert local.versions() == []


def test_unknown_state_is_named(local: CheckpointStore) -> None:
    with pytest.raises(CheckpointError, match=r"'a\.b'"):
        local.save(1, TENSORS, {"a": {"b": object()}})


# --- spec and ledger --------------------------------------------------------------------


def test_the_spec_comes_back(store: CheckpointStore) -> None:
    assert store.load_spec() is None
    store.save_spec({"recipe": {"model": "é"}, "config": {"clip_norm": 0.1}})
    assert store.load_spec() == {"recipe": {"model": "é"}, "config": {"clip_norm": 0.1}}


def test_a_damaged_spec_is_named(local: CheckpointStore) -> None:
    local.save_spec({"a": 1})
    (Path(local.path()) / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json"):
        local.load_spec()


def entries(first: int, last: int, note: str = "") -> list[str]:
    return [json.dumps({"version": version, "note": note}) for version in range(first, last + 1)]


def test_ledger_segments_are_read_in_order(store: CheckpointStore) -> None:
    assert store.read_ledger() == []
    store.append_ledger(entries(4, 5))
    store.append_ledger(entries(1, 3))
    store.append_ledger([])
    assert store.read_ledger() == entries(1, 5)


def test_later_segments_override_whatever_their_span(store: CheckpointStore, root: str) -> None:
    store.append_ledger(entries(1, 9, "old"))
    again = CheckpointStore(root, "run-1")  # another process, after a rollback to version 3
    again.append_ledger(entries(4, 5, "new"))
    again.append_ledger(entries(1, 1, "newest"))
    assert again.read_ledger() == [
        *entries(1, 1, "newest"),
        *entries(2, 3, "old"),
        *entries(4, 5, "new"),
        *entries(6, 9, "old"),
    ]


def test_the_same_span_twice_is_one_segment(local: CheckpointStore) -> None:
    local.append_ledger(entries(1, 3, "old"))
    local.append_ledger(entries(1, 3, "new"))
    assert local.read_ledger() == entries(1, 3, "new")
    assert [path.name for path in Path(local.path()).iterdir()] == ["ledger-000000001-000000003.jsonl"]


def test_entries_come_back_as_the_text_they_were(local: CheckpointStore) -> None:
    text = '{"version":7,"loss":0.1000000000000000055,"name":"é \\u2028 x"}'
    local.append_ledger([text])
    assert local.read_ledger() == [text]
    local.append_ledger(['{"version": 8,\n "a": "\u2028\x85"}'])
    assert json.loads(local.read_ledger()[1]) == {"version": 8, "a": "\u2028\x85"}


@pytest.mark.parametrize(
    "content", ["", "{", '{"sequence": 1}\n{"step": 2}\n', '{"sequence": 1}\nnonsense\n', "[]\n"]
)
def test_a_damaged_ledger_is_named(local: CheckpointStore, content: str) -> None:
    local.append_ledger(entries(1, 2))
    (Path(local.path()) / "ledger-000000001-000000002.jsonl").write_text(content)
    with pytest.raises(CheckpointError, match="ledger-000000001"):
        local.read_ledger()


@pytest.mark.parametrize("entry", ["{}", "[]", '{"version": "3"}', "nonsense"])
def test_entries_need_a_version(local: CheckpointStore, entry: str) -> None:
    with pytest.raises(CheckpointError, match="entry"):
        local.append_ledger([entry])


# --- places -----------------------------------------------------------------------------


def test_a_place_that_cannot_be_written_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = CheckpointStore(str(tmp_path / "file"), "run")
    for attempt in (lambda: store.save(1, TENSORS, STATE), lambda: store.save_spec({})):
        with pytest.raises(CheckpointError) as refused:
            attempt()
        assert str(tmp_path / "file") in str(refused.value)
        assert "TORCHORD_CHECKPOINT_DIR" in str(refused.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission"):
        CheckpointStore(str(tmp_path), "run").save_spec({})


def test_an_unknown_kind_of_url_is_named() -> None:
    with pytest.raises(CheckpointError, match="nosuchthing"):
        CheckpointStore("nosuchthing://bucket/runs", "run")


def test_a_file_is_on_disk_before_it_has_its_name_and_so_is_the_name_afterwards(
    local: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that loses its power has the file before or the one after, whole."""
    local.save_spec({"life": 1})
    before = {path.name: path.read_bytes() for path in Path(local.path()).iterdir()}
    did: list[str] = []
    synced: list[bytes] = []
    fsync, rename = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            assert os.path.samestat(os.fstat(descriptor), os.stat(local.path()))
            did.append("sync the folder")
        else:
            synced.append(os.pread(descriptor, 1 << 20, 0))
            did.append("sync the file")

    def noted_rename(source: str, target: Path) -> None:
        assert target.read_bytes() == before[target.name]
        rename(source, target)
        assert target.read_bytes() == synced.pop()
        did.append("rename")

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_rename)
    local.save_spec({"life": 2})
    assert did == ["sync the file", "rename", "sync the folder"]


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    local: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.save(1, TENSORS, STATE)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        local.save(2, TENSORS, STATE)
    monkeypatch.undo()
    assert local.latest_version() == 1
    assert [p.name for p in Path(local.path()).iterdir() if p.name.endswith(".tmp")] == []


def test_paths_name_the_run_and_the_version(local: CheckpointStore, tmp_path: Path) -> None:
    assert local.path() == str(tmp_path / "run-1")
    assert local.path(12) == str(tmp_path / "run-1" / "version-000000012.json")


def test_a_save_killed_at_any_write_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """A process that dies at its n-th rename: the newest whole checkpoint is 1 or 2, never damaged."""
    script = (
        "import os, sys, torch\n"
        "from torchord.cache.files.checkpoint import CheckpointStore\n"
        "root, deadly = sys.argv[1], int(sys.argv[2])\n"
        "count, rename = 0, os.replace\n"
        "def replace(a, b):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count == deadly: os._exit(9)\n"
        "    rename(a, b)\n"
        "os.replace = replace\n"
        "store = CheckpointStore(root, 'run')\n"
        "for v in (1, 2): store.save(v, {'w': torch.full((3,), float(v))}, {'m': torch.ones(v)})\n"
    )
    for deadly, expected in ((4, 1), (6, 1), (7, 2)):
        root = tmp_path / str(deadly)
        ended = subprocess.run([sys.executable, "-c", script, str(root), str(deadly)], cwd=Path.cwd())
        assert ended.returncode == (9 if deadly < 7 else 0)
        found = CheckpointStore(str(root), "run").latest()
        assert found is not None and found.version == expected and found.skipped == ()


def test_a_part_of_the_ledger_is_read_without_the_rest(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), "run-1")
    assert (store.entries_between(1, 9), store.last_entry()) == ({}, 0)
    store.append_ledger(entries(1, 3))
    store.append_ledger(entries(4, 6))
    store.append_ledger(entries(3, 5, "again"))
    (tmp_path / "run-1" / "ledger-000000007-000000009.jsonl").write_text("[")
    found = store.entries_between(2, 6)
    assert list(found) == [2, 3, 4, 5, 6] and store.last_entry() == 9
    assert ["again" in found[version] for version in range(2, 7)] == [False, True, True, True, False]
    with pytest.raises(CheckpointError):
        store.entries_between(6, 7)


def test_the_runs_under_a_place_and_the_meta_of_a_checkpoint(tmp_path: Path) -> None:
    assert runs_in(str(tmp_path / "nowhere")) == []
    for name in ("two", "one"):
        CheckpointStore(str(tmp_path), name).save(3, {}, {}, {"evaluations": {"3": {"loss": float("nan")}}})
    (tmp_path / "file").touch()
    assert runs_in(str(tmp_path)) == runs_in(f"file://{tmp_path}") == ["one", "two"]
    elsewhere = f"memory://{uuid.uuid4().hex}"
    CheckpointStore(elsewhere, "three").save_spec({})
    assert runs_in(elsewhere) == ["three"]
    assert str(CheckpointStore(str(tmp_path), "one").meta(3)) == "{'evaluations': {'3': {'loss': nan}}}"
