"""What a token cache promises: every token back, all or nothing on disk, and a sentence for every fault."""

import json
import os
import pickle
import re
import resource
import socket
import subprocess

import numpy as np
import pytest

from hmar_jax.data.tokens import TokenSource, write_shard, write_token_cache
from hmar_jax.errors import InputError, MachineError
from hmar_jax.scales import ScaleLadder

LADDER = ScaleLadder((1, 2, 3))
L = LADDER.length


def stream(sizes=(3, 2, 4), crops=2, codebook_size=64, seed=0):
    rng = np.random.default_rng(seed)
    for size in sizes:
        yield rng.integers(0, codebook_size, (crops, size, L)), rng.integers(0, 3, size)


def write(path, batches=None, **changes):
    fields = {"ladder": LADDER, "codebook_size": 64, "crops": 2, "class_names": ("a", "b", "c")}
    fields |= {"tokenizer": "sha:1", "source": "glyphs abc"} | changes
    return write_token_cache(path, stream() if batches is None else batches, **fields)


@pytest.mark.parametrize("shard_size", [1, 4, 9, 100])
def test_every_example_comes_back_in_order(tmp_path, shard_size):
    assert write(tmp_path / "cache", shard_size=shard_size) == 9
    source = TokenSource(tmp_path / "cache")
    tokens, labels = (
        np.concatenate(parts, axis) for parts, axis in zip(zip(*stream(), strict=True), (1, 0), strict=True)
    )
    assert len(source) == 9
    for i in [8, 0, 3, 5, 4, 1, 7, 2, 6]:
        example = source[i]
        assert example["tokens"].dtype == np.uint16
        assert example["label"].dtype == np.int32
        np.testing.assert_array_equal(example["tokens"], tokens[:, i])
        assert example["label"] == labels[i]
    assert len(list((tmp_path / "cache").glob("tokens-*-of-*.array_record"))) == -(-9 // shard_size)


def test_the_header_says_what_the_tokens_are(tmp_path):
    write(tmp_path / "cache")
    source = TokenSource(tmp_path / "cache")
    assert source.ladder == LADDER
    assert (source.codebook_size, source.crops) == (64, 2)
    assert source.class_names == ("a", "b", "c")
    assert (source.tokenizer, source.source) == ("sha:1", "glyphs abc")


def test_the_largest_codebook_fits(tmp_path):
    tokens = np.full((1, 1, L), 2**16 - 1)
    write(tmp_path / "cache", [(tokens, np.array([2]))], codebook_size=2**16, crops=1)
    np.testing.assert_array_equal(TokenSource(tmp_path / "cache")[0]["tokens"], tokens[:, 0])


def test_a_source_travels_to_another_process(tmp_path):
    write(tmp_path / "cache")
    source = TokenSource(tmp_path / "cache")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[4]["tokens"], source[4]["tokens"])


def test_an_index_out_of_range_is_an_index_error(tmp_path):
    write(tmp_path / "cache")
    assert len(list(TokenSource(tmp_path / "cache"))) == 9


@pytest.mark.parametrize(
    ("batch", "changes", "message"),
    [
        ((np.zeros((2, 1, L), int), np.zeros(1, int)), {"codebook_size": 2**16 + 1}, "65537"),
        ((np.full((2, 1, L), 64), np.zeros(1, int)), {}, "64.*expected integers from 0 to 63"),
        ((np.full((2, 1, L), -1), np.zeros(1, int)), {}, "-1"),
        ((np.zeros((2, 1, L)), np.zeros(1, int)), {}, "float64"),
        ((np.zeros((2, 1, L), int), np.full(1, 3)), {}, "labels from 3 to 3"),
        ((np.zeros((1, 1, L), int), np.zeros(1, int)), {}, r"\(1, 1, 14\)"),
        ((np.zeros((2, 1, L - 1), int), np.zeros(1, int)), {}, r"\(2, 1, 13\)"),
        ((np.zeros((2, 2, L), int), np.zeros(1, int)), {}, r"\(2, 2, 14\)"),
        (None, {"batches": []}, "no images"),
    ],
)
def test_what_does_not_fit_is_named_and_leaves_nothing(tmp_path, batch, changes, message):
    batches = changes.pop("batches", None) if batch is None else [*stream(), batch]
    with pytest.raises(InputError, match=message):
        write(tmp_path / "cache", batches, **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, InputError])
def test_an_interrupted_stream_leaves_nothing_and_its_error_passes(tmp_path, error):
    def interrupted():
        yield from stream()
        raise error("from the tokenizer")

    with pytest.raises(error, match="from the tokenizer"):
        write(tmp_path / "cache", interrupted(), shard_size=4)
    assert not list(tmp_path.iterdir())


def test_a_cache_shows_only_when_it_is_complete(tmp_path):
    def watched():
        for batch in stream():
            assert not (tmp_path / "cache").exists()
            yield batch

    write(tmp_path / "cache", watched(), shard_size=4)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_what_a_killed_process_left_of_a_cache_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    dead, host = subprocess.Popen(["true"]), socket.gethostname()
    dead.wait()
    left = [f".cache.partial-{host}-{process}" for process in (dead.pid, os.getpid())]
    kept = [
        f".cache.partial-{host}-{os.getppid()}",
        f".cache.partial-another-host-{dead.pid}",
        f".other.partial-{host}-{dead.pid}",
    ]
    for name in left + kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens-00000").write_text("half of it")
    write(tmp_path / "cache")
    assert {path.name for path in tmp_path.iterdir()} == {"cache", *kept}


def test_what_exists_is_never_overwritten(tmp_path):
    write(tmp_path / "cache")
    before = (tmp_path / "cache/cache.json").read_bytes()
    with pytest.raises(InputError, match="exists already"):
        write(tmp_path / "cache", tokenizer="sha:2")
    assert (tmp_path / "cache/cache.json").read_bytes() == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        write(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert write(tmp_path / "empty") == len(TokenSource(tmp_path / "empty"))


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the kernel's nearest thing to a full disk
    try:
        with pytest.raises(MachineError, match=r"write .*cache \(.*too large\); make room"):
            write(tmp_path / "cache", stream([4000] * 4, codebook_size=2**16), codebook_size=2**16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_parent_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"write .*file/cache .*; check the path"):
        write(tmp_path / "file/cache")


def change(**fields):
    """Changes fields of a header, which loses what it had no place for before it was recorded."""

    def apply(path):
        header = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({name: value for name, value in header.items() if name not in ("digest", "ends")}))

    return apply


def replace(make):
    def apply(path):
        path.unlink()
        make(path)

    return apply


SPECIAL = {
    "a folder": (os.mkdir, "is a folder; give a file"),
    "a named pipe": (os.mkfifo, "is a named pipe; give a file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is a device; give a file"),
    "a link to itself": (lambda path: path.symlink_to(path), "a symbolic link leads to itself"),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("digests", [True, False], ids=["with digests", "as of an earlier version"])
@pytest.mark.parametrize("file", ["cache.json", "tokens-00001-of-00003.array_record"])
def test_what_is_no_file_is_refused_and_not_called_damage(tmp_path, file, digests, kind):
    write(tmp_path / "cache", shard_size=3)
    if not digests:
        change()(tmp_path / "cache" / "cache.json")
    make, expected = SPECIAL[kind]
    replace(make)(tmp_path / "cache" / file)
    with pytest.raises(InputError, match=expected) as caught:
        list(TokenSource(tmp_path / "cache"))
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("cache.json", os.unlink, "no token cache"),
        ("cache.json", lambda path: path.write_text("{"), "is not JSON .*write the token cache again"),
        ("cache.json", lambda path: path.write_text("[" * 100_000), "is not JSON .*deeper than 64 levels"),
        ("cache.json", lambda path: path.write_text("[]"), r"is \[\]; expected an object"),
        ("cache.json", lambda path: path.write_text("{}"), "format None, not 1"),
        ("cache.json", lambda path: path.write_text('{"format": 1}'), "missing"),
        ("cache.json", change(format=2), "format 2, not 1"),
        ("cache.json", change(sides="1,2,3"), "sides"),
        ("cache.json", change(count=10), "9 of 10 images"),
        ("cache.json", change(count=0), "count is 0; expected 1"),
        ("cache.json", change(count=2**62), "9 of 4611686018427387904 images"),
        ("cache.json", change(crops=3), "image 0: its record has 60 bytes, expected 88"),
        ("cache.json", change(crops=-1), "crops is -1"),
        ("cache.json", change(crops=10**9), "expected 28000000004"),
        ("cache.json", change(sides=[1, 2, 4]), "its record has 60 bytes, expected 88"),
        ("cache.json", change(sides=[1, 2**40]), "tokens; expected 262144 at most"),
        ("cache.json", change(sides=[2, 1]), "increasing list"),
        ("cache.json", change(codebook_size=0), "codebook_size is 0"),
        ("cache.json", change(codebook_size=2**16 + 1), "codebook_size is 65537"),
        ("cache.json", change(shards=10**9), "3 of 1000000000 files are there|0 of 1000000000"),
        ("cache.json", change(shards=2), "0 of 2 files are there"),
        ("cache.json", change(shards=0), "shards is 0"),
        ("cache.json", change(class_names=["a", "b"]), "its label is 2, expected 0 to 1"),
        ("cache.json", change(class_names=["a", "b", "b"]), "Two classes are called 'b'"),
        ("cache.json", change(class_names=["a", "b", ""]), "name of class 2 is '', which is blank"),
        ("cache.json", change(class_names="abc"), "class_names"),
        ("cache.json", change(format=[1]), r"format \[1\], not 1"),
        ("cache.json", change(color="red"), "color.* does not exist"),
        ("tokens-00001-of-00003.array_record", os.unlink, "damaged .2 of 3 files are there"),
        ("tokens-00001-of-00003.array_record", lambda path: os.truncate(path, 70_000), "damaged"),
        ("tokens-00001-of-00003.array_record", lambda path: os.truncate(path, 0), "damaged"),
        ("tokens-00001-of-00003.array_record", lambda path: path.write_bytes(bytes(200_000)), "damaged"),
    ],
)
def test_a_damaged_cache_is_named(tmp_path, file, damage, message):
    write(tmp_path / "cache", shard_size=3)
    damage(tmp_path / "cache" / file)
    with pytest.raises(InputError, match=message):
        list(TokenSource(tmp_path / "cache"))


def test_a_header_that_was_changed_is_told_until_its_digest_is_deleted(tmp_path, caplog):
    write(tmp_path / "cache")
    file = tmp_path / "cache" / "cache.json"
    header = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(header.items()))))  # as another program may write it
    assert len(TokenSource(tmp_path / "cache")) == 9
    assert not caplog.records
    for _ in range(2):
        file.write_text(json.dumps(header | {"class_names": ["a", "b", "x"]}))
        assert TokenSource(tmp_path / "cache").class_names == ("a", "b", "x")
        (record,) = caplog.records
        assert re.search(r"cache.json is not as it was written.*delete the line with its digest", record.getMessage())
    caplog.clear()
    del header["digest"]
    file.write_text(json.dumps(header | {"class_names": ["a", "b", "x"]}))
    assert TokenSource(tmp_path / "cache").class_names == ("a", "b", "x")
    assert not caplog.records


def test_a_shard_of_another_cache_or_place_is_refused(tmp_path):
    for seed in (0, 1):
        write(tmp_path / f"{seed}", stream(seed=seed), shard_size=3)
    one, two = (tmp_path / "0" / f"tokens-0000{i}-of-00003.array_record" for i in (1, 2))
    before = one.read_bytes()
    for other in ((tmp_path / "1" / one.name).read_bytes(), two.read_bytes()):
        one.write_bytes(other)
        with pytest.raises(InputError, match=f"damaged .{one.name} is not the file that was written"):
            TokenSource(tmp_path / "0")
    one.write_bytes(before)
    assert len(list(TokenSource(tmp_path / "0"))) == 9


def replace_records(cache, records):
    """Writes other records than were written, as a program that knows the format may."""
    (file,) = cache.glob("*.array_record")
    write_shard(file, records, cache)
    change()(cache / "cache.json")


GOOD = np.int32(2).tobytes() + np.full((2, L), 63, "<u2").tobytes()


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (np.int32(-1).tobytes() + GOOD[4:], "image 5: its label is -1, expected 0 to 2"),
        (np.int32(3).tobytes() + GOOD[4:], "image 5: its label is 3, expected 0 to 2"),
        (GOOD[:-2] + np.uint16(64).tobytes(), "image 5: it has the code 64, expected 0 to 63"),
        (GOOD[:-2], "image 5: its record has 58 bytes, expected 60"),
        (GOOD + bytes(2), "image 5: its record has 62 bytes, expected 60"),
        (b"", "image 5: its record has 0 bytes"),
    ],
)
def test_a_label_a_code_or_a_size_that_is_out_of_range_is_refused(tmp_path, record, expected):
    write(tmp_path / "cache")
    replace_records(tmp_path / "cache", [GOOD] * 9)
    assert [example["label"] for example in TokenSource(tmp_path / "cache")] == [2] * 9
    replace_records(tmp_path / "cache", [*[GOOD] * 5, record, *[GOOD] * 3])
    source = TokenSource(tmp_path / "cache")
    assert source[4]["tokens"].max() == 63
    with pytest.raises(InputError, match=f"damaged .{expected}"):
        source[5]


def test_a_cache_without_names_is_bounded_by_the_classes_that_are_trained(tmp_path):
    write(tmp_path / "cache")
    change(class_names=[])(tmp_path / "cache" / "cache.json")
    assert len(list(TokenSource(tmp_path / "cache").with_classes(3))) == 9
    with pytest.raises(InputError, match="its label is 2, expected 0 to 1"):
        list(TokenSource(tmp_path / "cache").with_classes(2))


def test_a_cache_of_an_earlier_version_is_read(tmp_path):
    write(tmp_path / "cache", shard_size=3)
    change()(tmp_path / "cache" / "cache.json")
    assert "digest" not in (tmp_path / "cache" / "cache.json").read_text()
    assert len(list(TokenSource(tmp_path / "cache"))) == 9


def test_a_missing_cache_says_how_to_write_one(tmp_path):
    with pytest.raises(InputError, match="hmar-jax export tokens"):
        TokenSource(tmp_path / "nowhere")
