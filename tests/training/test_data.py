"""Pictures, captions, buckets and caches: what is read, what is refused, and what is the same every time."""

import errno
import io
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from training_specimens import write_pictures

from refiners.fluxion.utils import image_to_tensor
from refiners.foundationals.scenes import parse_caption, read_scenes
from refiners.training.data import cache as cache_module
from refiners.training.data.buckets import BucketSampler, bucket_sizes, choose_size, fit
from refiners.training.data.cache import TensorCache, fingerprint, key_of
from refiners.training.data.captions import CaptionRule
from refiners.training.data.latents import Conditioning, LatentBatches, LatentCache, SampleRule
from refiners.training.data.pictures import DataError, DataWarning, decode, read_folder, read_hub, with_captions
from refiners.training.data.scenes import draw_pictures

SIZES = [(32, 32), (24, 40), (40, 24)]


def test_captions_are_found_beside_the_pictures_and_in_the_metadata(tmp_path: Path) -> None:
    write_pictures(tmp_path / "inner", 2)
    write_pictures(tmp_path, 1)
    rows = [{"file_name": "00.png", "text": "from metadata"}, {"file_name": "inner/01.png", "text": "inner one"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    captions = {
        Path(picture.name).relative_to(tmp_path).as_posix(): picture.caption for picture in read_folder(tmp_path)
    }
    assert captions == {"00.png": "from metadata", "inner/00.png": "a red disc", "inner/01.png": "inner one"}


def test_a_missing_or_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="there are no pictures in it"):
        read_folder(tmp_path)


def test_captions_without_pictures_stop_or_are_left_out(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2)
    (tmp_path / "lost.txt").write_text("nothing to see")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "a"}\n')
    with pytest.raises(
        DataError, match=r"2 captions have no picture: lost, gone\.png; mend them, or set dataset.on_bad"
    ):
        read_folder(tmp_path)
    with pytest.warns(DataWarning, match="lost"):
        assert len(read_folder(tmp_path, "skip")) == 2


def test_pictures_without_captions_stop_or_are_left_out_or_get_a_default(tmp_path: Path) -> None:
    write_pictures(tmp_path, 3)
    (tmp_path / "01.txt").unlink()
    pictures = read_folder(tmp_path)
    with pytest.raises(DataError, match=r"1 of 3 pictures have no caption: .*01\.png"):
        with_captions(pictures, "stop")
    with pytest.warns(DataWarning, match=r"01\.png"):
        assert len(with_captions(pictures, "skip")) == 2
    with pytest.raises(DataError, match=r"none of the 1 pictures has a caption \(first: .*01\.png\); write each into"):
        with_captions(pictures[1:2], "skip")
    assert [each.caption for each in with_captions(pictures, "stop", "a thing")] == [
        "a red disc",
        "a thing",
        "a blue disc",
    ]


@pytest.mark.parametrize(
    "line", ['{"file_name": "a.png"}', '{"file_name": "a.png", "text": null}', "{", '"text"', "[1]"]
)
def test_a_damaged_metadata_line_is_named(tmp_path: Path, line: str) -> None:
    write_pictures(tmp_path, 1)
    (tmp_path / "metadata.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(DataError, match=r"metadata\.jsonl, line 2: a line should be like"):
        read_folder(tmp_path)


def test_a_caption_that_is_no_text_is_named(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    (tmp_path / "00.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"00\.txt: this caption is not UTF-8"):
        read_folder(tmp_path)
    (tmp_path / "00.txt").unlink()
    line = '{"file_name": "00.png", "text": "un été"}'
    (tmp_path / "metadata.jsonl").write_text(line, encoding="latin-1")
    with pytest.raises(DataError, match=r"metadata\.jsonl: this file is not UTF-8"):
        read_folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(line, encoding="utf-8-sig")
    assert [each.caption for each in read_folder(tmp_path)] == ["un été"]


def test_transparent_parts_are_white_and_pictures_upright(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGBA", (2, 1), (255, 0, 0, 0)).save(path)
    assert decode(path.read_bytes(), "a").getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (3, 2))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "b.jpg", exif=exif)
    assert decode((tmp_path / "b.jpg").read_bytes(), "b").size == (2, 3)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_sixteen_bits_keep_their_greys(mode: str) -> None:
    greys, file = numpy.linspace(0, 65535, 64).reshape(8, 8).astype(numpy.uint16), io.BytesIO()
    Image.fromarray(greys).save(file, "PNG")
    found = numpy.asarray(decode(file.getvalue(), "a", mode)).reshape(8, 8, -1).astype(int)
    assert abs(found - (greys / 257)[:, :, None]).max() <= 1


def test_a_mark_of_the_byte_order_is_no_part_of_a_caption(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    (tmp_path / "00.txt").write_text("a cat\n", encoding="utf-8-sig")  # as the Notepad of Windows saves it
    assert [each.caption for each in read_folder(tmp_path)] == ["a cat"]


def latents(cache: TensorCache, has_flips: bool = False) -> tuple[LatentCache, list[Tensor]]:
    """A cache whose encoder is a mean over blocks of 4 x 4 pixels, and the pictures it encoded."""
    seen: list[Tensor] = []

    def encode(pixels: Tensor) -> Tensor:
        seen.append(pixels)
        return torch.nn.functional.avg_pool2d(pixels, 4)

    return LatentCache(cache, encode, "encoder", SIZES, factor=4, has_flips=has_flips), seen


def test_a_broken_picture_stops_or_is_left_out(tmp_path: Path) -> None:
    write_pictures(tmp_path, 3)
    content = (tmp_path / "01.png").read_bytes()
    (tmp_path / "01.png").write_bytes(content[: len(content) // 2])
    pictures = with_captions(read_folder(tmp_path), "stop")
    with pytest.raises(DataError, match=r'01\.png: this is no picture that can be read .*on_bad_item = "skip"'):
        latents(TensorCache(None))[0].items(pictures, "stop")
    with pytest.warns(DataWarning, match=r"01\.png"):
        assert len(latents(TensorCache(None))[0].items(pictures, "skip")) == 2
    with pytest.raises(DataError, match="none of the 1 pictures can be read"), pytest.warns(DataWarning):
        latents(TensorCache(None))[0].items(pictures[1:2], "skip")


def test_a_file_that_is_gone_or_in_no_known_format_is_a_broken_picture(tmp_path: Path) -> None:
    write_pictures(tmp_path, 3)
    (tmp_path / "01.png").write_bytes(b"no picture")
    pictures = read_folder(tmp_path)
    (tmp_path / "02.png").unlink()
    for place, message in ((1, r"01\.png: this is no picture in a known format"), (2, r"02\.png: it cannot be read")):
        with pytest.raises(DataError, match=message):
            latents(TensorCache(None))[0].items(pictures[place:], "stop")
    with pytest.warns(DataWarning, match="2 of 3 pictures"):
        assert len(latents(TensorCache(None))[0].items(pictures, "skip")) == 1


def test_a_full_disk_is_not_taken_for_a_broken_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, tensors: dict[str, Tensor]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_module, "write_safetensors", fail)
    pictures = read_folder(write_pictures(tmp_path / "pictures", 1))
    with pytest.raises(OSError, match="No space left on device"):
        latents(TensorCache(tmp_path / "cache"))[0].items(pictures, "skip")


def test_latents_are_worked_out_once_and_kept_on_disk(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 3)
    pictures = with_captions(read_folder(tmp_path / "pictures"), "stop")
    first, seen = latents(TensorCache(tmp_path / "cache"), has_flips=True)
    items = first.items(pictures, "stop")
    assert len(seen) == 6
    torch.testing.assert_close(items[0].read(True)["latents"], items[0].read(False)["latents"].flip(-1))
    again, seen = latents(TensorCache(tmp_path / "cache"), has_flips=True)
    assert torch.equal(again.items(pictures, "stop")[2].read(True)["latents"], items[2].read(True)["latents"])
    assert not seen
    damaged = next((tmp_path / "cache").rglob("*.safetensors"))
    damaged.write_bytes(b"interrupted")
    third, seen = latents(TensorCache(tmp_path / "cache"), has_flips=True)
    third.items(pictures, "stop")
    assert len(seen) == 1
    write_pictures(tmp_path / "pictures", 1, size=(36, 36))  # the same name, other content
    fourth, seen = latents(TensorCache(tmp_path / "cache"), has_flips=True)
    fourth.items(with_captions(read_folder(tmp_path / "pictures"), "stop"), "stop")
    assert len(seen) == 2


def test_a_cache_beyond_its_limit_of_memory_reads_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MEMORY_LIMIT", 100)
    cache, made = TensorCache(tmp_path), list[str]()

    def make(name: str) -> dict[str, Tensor]:
        made.append(name)
        return {"x": torch.full((20,), float(name))}

    for name in ("1", "2", "1", "2"):
        assert cache.get(key_of(name), lambda name=name: make(name))["x"][0] == float(name)
    assert made == ["1", "2"]


def test_fingerprints_tell_weights_apart() -> None:
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert fingerprint(first) == fingerprint(first) != fingerprint(second)
    assert key_of("a", "b") != key_of("ab") != key_of(b"ab")


def test_masks_follow_their_pictures(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 2)
    (tmp_path / "masks").mkdir()
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 16, 32))
    mask.save(tmp_path / "masks" / "00.png")
    pictures = with_captions(read_folder(tmp_path / "pictures", mask_folder=tmp_path / "masks"), "stop")
    items = latents(TensorCache(None), has_flips=True)[0].items(pictures, "stop")
    left = torch.tensor([1.0, 0.0]).repeat_interleave(4).expand(1, 8, 8)
    assert torch.equal(items[0].read(False)["mask"], left) and torch.equal(items[0].read(True)["mask"], left.flip(-1))
    batch = LatentBatches(items, 2, SampleRule(seed=0), None).get(0, 0, 0, 1)
    assert batch.masks is not None and sorted(batch.masks.mean((1, 2, 3)).tolist()) == [0.5, 1.0]


GREY = Conditioning(lambda image: image_to_tensor(image.convert("L"))[0], mark="grey")


def write_conditioning(folder: Path, count: int) -> None:
    """A picture each of which the left half is black, of twice the size."""
    folder.mkdir(parents=True)
    for index in range(count):
        image = Image.new("RGB", (64, 64), "white")
        image.paste("black", (0, 0, 32, 64))
        image.save(folder / f"{index:02d}.png")


def test_conditioning_pictures_are_found_by_name_and_in_the_metadata_and_are_no_samples(tmp_path: Path) -> None:
    write_pictures(tmp_path, 3)
    write_conditioning(tmp_path / "edges", 2)
    pictures = read_folder(tmp_path, conditioning_folder=tmp_path / "edges")
    found = {Path(picture.name).name: picture.conditioning for picture in pictures}
    assert [name for name, read in found.items() if read] == ["00.png", "01.png"] and found["02.png"] is None
    rows = [{"file_name": f"{name}.png", "text": name, "conditioning_image": "edges/01.png"} for name in ("00", "02")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "edges" / "00.png").unlink()
    pictures = read_folder(tmp_path)
    assert [bool(picture.conditioning) for picture in pictures] == [True, False, True]


def test_conditioning_follows_its_picture_in_size_and_flips_and_is_dropped_as_often_as_asked(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 2)
    write_conditioning(tmp_path / "edges", 2)
    pictures = with_captions(read_folder(tmp_path / "pictures", conditioning_folder=tmp_path / "edges"), "stop")
    cache = LatentCache(TensorCache(None), lambda pixels: pixels, "encoder", SIZES, 1, True, GREY)
    items = cache.items(pictures, "stop")
    left = torch.tensor([0.0, 1.0]).repeat_interleave(16).expand(1, 32, 32)
    plain, flipped = items[0].read(False)["conditioning"], items[0].read(True)["conditioning"]
    assert torch.equal(plain.round(), left) and torch.equal(flipped, plain.flip(-1))
    batch = LatentBatches(items, 2, SampleRule(seed=0), None).get(0, 0, 0, 1)
    assert batch.conditioning is not None and torch.equal(batch.conditioning, plain.expand(2, 1, 32, 32))
    batches = LatentBatches(items, 2, SampleRule(seed=0, conditioning_drop_probability=0.25), None)
    drawn = [batches.get(epoch, 0, 0, 1).conditioning for epoch in range(200)]
    dropped = torch.cat([each.amax((1, 2, 3)) == 0 for each in drawn if each is not None])
    assert len(dropped) == 400 and 0.18 < dropped.float().mean() < 0.32


def test_a_picture_without_conditioning_is_led_by_itself_or_an_error(tmp_path: Path) -> None:
    pictures = with_captions(read_folder(write_pictures(tmp_path, 1)), "stop")
    args = (TensorCache(None), lambda pixels: pixels, "encoder", SIZES, 1, False)
    with pytest.raises(DataError, match=r"00\.png: there is no conditioning picture .*dataset\.conditioning_folder"):
        LatentCache(*args, GREY).items(pictures, "stop")
    (item,) = LatentCache(*args, replace(GREY, is_its_own=True)).items(pictures, "stop")
    tensors = item.read(False)
    assert torch.equal(tensors["conditioning"][0] > 0.9, tensors["latents"].amin(0) > 0.9)


def test_conditioning_is_part_of_what_tells_entries_of_the_cache_apart(tmp_path: Path) -> None:
    pictures = with_captions(read_folder(write_pictures(tmp_path, 1)), "stop")
    keys: set[str] = set()
    for conditioning in (None, GREY, replace(GREY, mark="other")):
        own = conditioning and replace(conditioning, is_its_own=True)
        cache = LatentCache(TensorCache(None), lambda pixels: pixels, "encoder", SIZES, 1, False, own)
        keys.add(cache.items(pictures, "stop")[0].key)
    led = replace(pictures[0], conditioning=lambda: (tmp_path / "00.png").read_bytes() + b" ")
    keys.add(LatentCache(TensorCache(None), lambda x: x, "encoder", SIZES, 1, False, GREY).items([led], "stop")[0].key)
    assert len(keys) == 4


def test_drawn_scenes_are_the_same_each_time_and_say_nothing_of_places() -> None:
    first, again = draw_pictures(12, "edges", seed=3), draw_pictures(12, "edges", seed=3)
    other = draw_pictures(12, "edges", seed=4)
    contents = [
        [(p.read(), p.caption, p.conditioning and p.conditioning()) for p in each] for each in (first, again, other)
    ]
    assert contents[0] == contents[1] != contents[2]
    for picture in first:
        assert picture.caption is not None
        request = parse_caption(picture.caption)
        (scene,) = read_scenes([decode(picture.read(), picture.name)])
        assert not request.asks_for_places and Counter(request.things) == Counter(scene.things)


def test_masks_lie_in_the_folders_of_their_pictures_and_none_is_lost(tmp_path: Path) -> None:
    for name, shade in (("one", 10), ("two", 20)):
        write_pictures(tmp_path / "pictures" / name, 1)
        (tmp_path / "masks" / name).mkdir(parents=True)
        Image.new("L", (4, 4), shade).save(tmp_path / "masks" / name / "00.png")
    pictures = read_folder(tmp_path / "pictures", mask_folder=tmp_path / "masks")
    shades = [decode(each.mask(), "a", "L").getpixel((0, 0)) for each in pictures if each.mask is not None]
    assert shades == [10, 20]
    Image.new("L", (4, 4)).save(tmp_path / "masks" / "oo.png")
    with pytest.raises(DataError, match=r"1 masks have no picture: .*oo\.png; mend them"):
        read_folder(tmp_path / "pictures", mask_folder=tmp_path / "masks")
    with pytest.warns(DataWarning, match=r"oo\.png"):
        assert len(read_folder(tmp_path / "pictures", "skip", tmp_path / "masks")) == 2


def test_buckets_have_about_the_area_and_all_fit() -> None:
    sizes = bucket_sizes(512, 64, 2)
    assert (512, 512) in sizes and all(width % 64 == height % 64 == 0 for width, height in sizes)
    assert all(0.7 < width * height / 512**2 <= 1 for width, height in sizes)
    assert all((height, width) in sizes for width, height in sizes)
    assert choose_size((1000, 1000), sizes) == (512, 512)
    width, height = choose_size((2000, 1100), sizes)
    assert width / height == pytest.approx(2000 / 1100, rel=0.2)
    for size in ((10, 300), (300, 10), (64, 64), (1, 1)):
        assert fit(Image.new("RGB", size), (96, 64)).size == (96, 64)


def test_what_stands_over_is_cut_off_evenly() -> None:
    image = Image.new("L", (6, 2))
    image.putdata([0, 50, 100, 150, 200, 250] * 2)
    assert list(fit(image, (2, 2)).get_flattened_data()) == [100, 150] * 2


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=4), batch_size=st.integers(1, 5), epoch=st.integers(0, 3)
)
@settings(deadline=None, max_examples=50)
def test_an_epoch_has_every_item_in_full_batches_of_one_bucket(counts: list[int], batch_size: int, epoch: int) -> None:
    buckets = [bucket for bucket, count in enumerate(counts) for _ in range(count)]
    sampler = BucketSampler(buckets, batch_size, seed=1)
    batches = [sampler.batch(epoch, index) for index in range(len(sampler))]
    assert all(len(batch) == batch_size and len({buckets[item] for item in batch}) == 1 for batch in batches)
    assert {item for batch in batches for item in batch} == set(range(len(buckets)))
    again = BucketSampler(buckets, batch_size, seed=1)
    assert [again.batch(epoch, index) for index in reversed(range(len(again)))] == batches[::-1]


def test_epochs_come_in_different_orders() -> None:
    sampler = BucketSampler([0] * 50, 50, seed=0)
    assert sampler.batch(0, 0) != sampler.batch(1, 0) != BucketSampler([0] * 50, 50, seed=1).batch(1, 0)


def test_captions_come_as_often_as_they_should() -> None:
    rule = CaptionRule("zwx", trigger_only_probability=0.5, drop_probability=0.2, templates=("{}", "photo of {}"))
    generator = torch.Generator().manual_seed(0)
    counts = Counter(rule.choose("a cat", generator) for _ in range(4000))
    assert set(counts) == rule.all_for("a cat") == {"", "zwx", "zwx, a cat", "zwx, photo of a cat"}
    shares = {text: count / 4000 for text, count in counts.items()}
    expected = {"": 0.2, "zwx": 0.4, "zwx, a cat": 0.2, "zwx, photo of a cat": 0.2}
    assert shares == pytest.approx(expected, abs=0.03)
    assert CaptionRule().choose("a cat", generator) == "a cat" and CaptionRule().all_for("a cat") == {"a cat"}


def test_a_sample_depends_on_its_place_alone(tmp_path: Path) -> None:
    pictures = with_captions(read_folder(write_pictures(tmp_path)), "stop")
    items = latents(TensorCache(None), has_flips=True)[0].items(pictures, "stop")
    rule = SampleRule(seed=3, flip_probability=0.5, offset_noise=0.1, captions=CaptionRule("zwx", 0.5))
    batches = LatentBatches(items, 4, rule, lambda text: torch.full((2, 3), float(len(text))))
    whole = batches.get(2, 1, 0, 1)
    torch.manual_seed(5)
    halves = [batches.get(2, 1, rank, 2) for rank in (1, 0)][::-1]
    for name in ("latents", "noise", "timesteps", "weights", "embeddings"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name)), name
    assert halves[0].texts + halves[1].texts == whole.texts
    assert not torch.equal(batches.get(3, 1, 0, 1).noise, whole.noise)


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_read_by_column(tmp_path: Path) -> None:
    datasets: Any = pytest.importorskip("datasets")
    write_pictures(tmp_path / "data", 3)
    write_conditioning(tmp_path / "data" / "edges", 3)
    rows = [
        {
            "file_name": f"{index:02d}.png",
            "edges_file_name": f"edges/{index:02d}.png",
            "caption": f"number {index}",
            "tags": ["a", "b"],
        }
        for index in range(3)
    ]
    for path in (tmp_path / "data").glob("*.txt"):
        path.unlink()
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    pictures = read_hub(str(tmp_path / "data"), caption_column="caption", conditioning_column="edges")
    assert [picture.caption for picture in pictures] == ["number 0", "number 1", "number 2"]
    assert decode(pictures[1].read(), "1").size == (32, 32)
    assert pictures[1].conditioning and decode(pictures[1].conditioning(), "1").size == (64, 64)
    assert read_hub(str(tmp_path / "data"), caption_column="caption")[1].conditioning is None
    with pytest.raises(DataError, match="there is no column 'text', only image, "):
        read_hub(str(tmp_path / "data"))
    with pytest.raises(DataError, match=r"data\[0\]: 'tags' is \['a', 'b'\], but a caption is a text"):
        read_hub(str(tmp_path / "data"), caption_column="tags")
