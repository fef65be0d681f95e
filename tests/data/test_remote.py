"""Shards at a URL, from a real HTTP server and an S3-compatible one, are equal to those on the
local disk, and faults are reported.
"""

import contextlib
import os
import shutil
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from damage import overwrite

from icl_moe.cli import main
from icl_moe.data import location
from icl_moe.data.cache import FileCache
from icl_moe.data.loader import MicroBatches, micro_batches
from icl_moe.data.schedule import RankSlice, Schedule
from icl_moe.data.shards import ShardSet
from icl_moe.errors import InputError

LARGE = 10**9


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder. `faults` maps a file name to its next failures; `asked` counts the requests
    for each file.
    """

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[1]
        self.server.asked[name] += 1
        fault = self.server.faults.get(name, []).pop(0) if self.server.faults.get(name) else None
        if fault == "cut":  # The connection ends before the content is complete.
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
        elif fault is not None:
            self.send_error(fault)
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def server(folder, tmp_path):
    """A server of a copy of the shards; `server.folder` is the copy, `server.url` its address."""
    copy = Path(shutil.copytree(folder, tmp_path / "served" / "shards"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(copy.parent)))
    server.faults, server.asked = {}, Counter()
    server.folder, server.url = copy, f"http://127.0.0.1:{server.server_port}/shards"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def bucket(folder, monkeypatch):
    """The URL of the shards in a bucket of moto's server, configured only by environment variables,
    as a user would do.
    """
    import boto3
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    for name, value in {**settings, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="data")
    for path in (
        path for path in folder.rglob("*") if path.is_file() and "synthetic" not in path.parts
    ):
        client.upload_file(str(path), "data", f"shards/{path.relative_to(folder).as_posix()}")
    yield "s3://data/shards"
    moto.stop()


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(location, "_WAITS", (0.01, 0.01))


def batches(shards: ShardSet, workers: int = 0) -> list:
    """The first ten steps of training, global batches of 4 in micro-batches of 2."""
    part = RankSlice.of(0, 1, 4, 2)
    dataset = MicroBatches(
        shards, Schedule(shards.manifest.samples, 4, seed=5), part, "packed", 0.5
    )
    return list(micro_batches(dataset, part.micro_steps, 0, 10, workers))


def assert_equal_batches(ours: list, theirs: list) -> None:
    assert len(ours) == len(theirs) == 20
    for one, other in zip(ours, theirs, strict=True):
        assert one.sources == other.sources
        assert one.loss_scale == other.loss_scale
        for name in ("tokens_T", "positions_T", "predictors_P", "labels_P", "weights_P"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def held(cache: FileCache) -> int:
    """The size of a cache on the disk in bytes. Other processes may delete its files meanwhile."""
    size = 0
    for path in cache.folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size if path.is_file() else 0
    return size


def test_batches_over_http_are_those_of_local_disk_and_each_file_comes_once(
    folder, server, tmp_path
):
    shards = ShardSet(server.url, FileCache(tmp_path / "cache", LARGE))
    expected = batches(ShardSet(folder))
    assert_equal_batches(batches(shards, workers=2), expected)
    assert_equal_batches(
        batches(ShardSet(server.url, FileCache(tmp_path / "cache", LARGE))), expected
    )
    assert {server.asked[shard.file] for shard in shards.manifest.shards} == {1}


def test_batches_from_an_s3_bucket_are_those_of_local_disk(folder, bucket, tmp_path):
    shards = ShardSet(bucket, FileCache(tmp_path / "cache", LARGE))
    assert_equal_batches(batches(shards, workers=1), batches(ShardSet(folder)))
    with pytest.raises(
        InputError, match=r"there are no shards in s3://data/elsewhere, which has no manifest.json"
    ):
        ShardSet("s3://data/elsewhere", FileCache(tmp_path / "cache", LARGE))


def test_tokenizers_come_as_folders(folder, server, tmp_path):
    shards = ShardSet(server.url, FileCache(tmp_path / "cache", LARGE))
    for name in ("image_tokenizer", "text_tokenizer"):
        fetched = shards.fetch(name)
        assert {path.name: path.read_bytes() for path in fetched.iterdir()} == {
            path.name: path.read_bytes() for path in (folder / name).iterdir()
        }


def test_tokenizers_stay_in_a_cache_that_the_shards_overflow(folder, server, tmp_path):
    manifest = ShardSet(folder).manifest
    of_tokenizers = sum(info.bytes for info in manifest.files if "tokenizer" in info.file)
    largest = max(shard.bytes for shard in manifest.shards)
    cache = FileCache(tmp_path / "cache", of_tokenizers + largest)
    shards = ShardSet(server.url, cache)
    folders = {name: shards.fetch(name) for name in ("image_tokenizer", "text_tokenizer")}
    for index in (0, 24, 1):
        for task in manifest.samples:
            shards.sample(task, index)
    assert max(server.asked[shard.file] for shard in manifest.shards) > 1, (
        "there is no room for all"
    )
    for name, fetched in folders.items():
        names = {path.name for path in (folder / name).iterdir()}
        assert {path.name for path in fetched.iterdir()} == names
    assert held(cache) <= cache.capacity


def test_a_cache_without_room_beside_what_is_in_use_says_so(tmp_path):
    cache = FileCache(tmp_path / "cache", 100)
    cache.keep("tokenizer/model", 60, lambda path: path.write_bytes(b"m" * 60))
    with pytest.raises(
        InputError, match=r"hold 100 bytes, of which 60 are in use, but a\.tar takes 50 more"
    ):
        cache.open("a.tar", 50, lambda path: path.write_bytes(b"a" * 50))
    os.close(cache.open("b.tar", 40, lambda path: path.write_bytes(b"b" * 40)))


def test_the_cache_keeps_its_bound_and_what_is_open_stays_readable(folder, server, tmp_path):
    manifest = ShardSet(folder).manifest
    cache = FileCache(
        tmp_path / "cache",
        2 * max(shard.bytes for shard in manifest.shards)
        + sum(info.bytes for info in manifest.files[:2]),
    )
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "mine").write_bytes(b"of the user")
    local, remote = ShardSet(folder), ShardSet(server.url, cache)
    holder = ShardSet(server.url, cache)
    first = holder.sample("segmentation", 0).meta
    for index in (0, 10, 20, 5, 15, 24):
        for task in ("segmentation", "captioning"):
            assert remote.sample(task, index).meta == local.sample(task, index).meta
            assert held(cache) <= cache.capacity
    # The shard of this sample was removed from the cache long before.
    assert holder.sample("segmentation", 0).meta == first
    assert max(server.asked[shard.file] for shard in manifest.shards) > 1
    assert (tmp_path / "cache" / "mine").exists()


def read_everything(url: str, cache: FileCache, order: int) -> int:
    shards = ShardSet(url, cache)
    largest = 0
    for index in range(0, 25, 4):
        for task in ("segmentation", "captioning"):
            sample = shards.sample(task, (index * order) % 25)
            assert sample.sequence.tokens_L.tobytes()
            largest = max(largest, held(cache))
    return largest


def test_processes_share_a_small_cache_without_harm(folder, server, tmp_path):
    manifest = ShardSet(folder).manifest
    cache = FileCache(tmp_path / "cache", 2 * max(shard.bytes for shard in manifest.shards))
    with ProcessPoolExecutor(3) as pool:
        largest = list(pool.map(partial(read_everything, server.url, cache), (1, 2, 3)))
    assert max(largest) <= cache.capacity
    assert not list(cache.folder.rglob("*.partial"))


def test_a_download_that_a_killed_process_left_behind_is_no_obstacle(folder, server, tmp_path):
    cache = FileCache(tmp_path / "cache", LARGE)
    shards = ShardSet(server.url, cache)
    shard = shards.manifest.shards[0]
    shards.sample("segmentation", 0)
    whole = next(cache.folder.rglob(shard.file))
    os.replace(whole, whole.with_name(f"{shard.file}.{shard.bytes}.partial"))
    assert (
        ShardSet(server.url, cache).sample("segmentation", 0).meta
        == ShardSet(folder).sample("segmentation", 0).meta
    )


def test_a_cache_that_cannot_hold_a_shard_says_so(server, tmp_path):
    with pytest.raises(
        InputError,
        match=r"data.cache_gigabytes: the cache .* may hold 3000 bytes, but .* alone takes \d+",
    ):
        ShardSet(server.url, FileCache(tmp_path / "cache", 3000)).sample("segmentation", 0)


@pytest.mark.parametrize("fault", ["cut", 503])
def test_a_failure_that_passes_is_not_noticed(server, tmp_path, fault):
    server.faults["segmentation-000000.tar"] = [fault, fault]
    ShardSet(server.url, FileCache(tmp_path / "cache", LARGE)).sample("segmentation", 0)
    assert server.asked["segmentation-000000.tar"] == 3


@pytest.mark.parametrize(
    ("faults", "message", "requests"),
    [
        (["cut"] * 3, r"segmentation-000000.tar cannot be read \(", 3),
        ([503] * 3, r"segmentation-000000.tar cannot be read \(503", 3),
        ([404], r"segmentation-000000.tar does not exist", 1),
        ([403], r"segmentation-000000.tar cannot be read \(403", 1),
    ],
)
def test_a_failure_that_stays_is_one_sentence_with_the_url(
    server, tmp_path, faults, message, requests
):
    server.faults["segmentation-000000.tar"] = faults
    with pytest.raises(
        InputError, match=rf"segmentation-00000000 cannot be read: {server.url}/{message}"
    ) as raised:
        ShardSet(server.url, FileCache(tmp_path / "cache", LARGE)).sample("segmentation", 0)
    assert "\n" not in str(raised.value)
    assert server.asked["segmentation-000000.tar"] == requests


def test_a_remote_shard_that_is_corrupt_or_truncated_is_named(server, tmp_path):
    overwrite(server.folder, "segmentation", 3, "tokens", lambda raw: raw[:-2] + bytes(2))
    (server.folder / "captioning-000000.tar").write_bytes(b"short")
    shards = ShardSet(server.url, FileCache(tmp_path / "cache", LARGE))
    with pytest.raises(
        InputError,
        match=(
            rf"{server.url}/segmentation-000000.tar is corrupt: its sha256 differs from the "
            rf"manifest"
        ),
    ):
        shards.sample("segmentation", 0)
    with pytest.raises(
        InputError, match=rf"{server.url}/captioning-000000.tar is truncated: it has 5 bytes"
    ):
        shards.sample("captioning", 0)


def test_the_command_line_reads_a_url_and_says_in_one_sentence_when_the_server_is_down(
    server, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["shards", "verify", server.url]) == 0
    assert (
        f"{server.url}: 6 shards with 50 samples are complete and correct"
        in capsys.readouterr().out
    )
    assert main(["shards", "stats", server.url]) == 0
    assert server.url in capsys.readouterr().out
    server.shutdown()
    server.server_close()
    for command in (
        ["shards", "verify", server.url],
        ["train", "demo", f"data.shards={server.url}"],
    ):
        assert main(command) == 2
        (sentence,) = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("icl-moe:")
        ]
        assert f"{server.url}/manifest.json cannot be read (" in sentence


def test_a_protocol_whose_package_is_missing_or_unknown_is_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(
        InputError,
        match=(
            r"gs://b/f/manifest.json needs a package for gs:// .*: pip install "
            r"'icl-moe\[remote\]'"
        ),
    ):
        ShardSet("gs://b/f")
    with pytest.raises(
        InputError,
        match=r"nonsense://b/f/manifest.json cannot be read \(Protocol not known: nonsense\)",
    ):
        ShardSet("nonsense://b/f")
