"""Sources to pixels and samples: what is shown to a model, and what is refused in one line."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.media_files import bomb, data_uri, encoded, picture, recording
from onelayer.compiler.errors import InputError
from onelayer.compiler.media.audio import read_audio
from onelayer.compiler.media.images import read_image
from onelayer.compiler.media.processors import load_processor
from onelayer.compiler.media.sources import Folder, MediaSource, media_source
from scripts.sweep.vision_models import save_vision_model

WHERE = "rows.jsonl:3: field 'image'"


def source(value: object, folder: Path, kind: str = "image") -> MediaSource:
    return media_source(value, kind, WHERE, Folder(folder, folder))  # type: ignore[arg-type]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(read_image(media_source(data, "image", WHERE, None)))


def test_every_source_gives_the_same_pixels(tmp_path: Path) -> None:
    image = picture()
    image.save(tmp_path / "a.png")
    for value in (
        "a.png",
        data_uri(image),
        {"bytes": encoded(image), "path": "x.png"},
        {"path": "a.png"},
        encoded(image),
    ):
        assert np.array_equal(np.asarray(read_image(source(value, tmp_path))), np.asarray(image))


def test_bytes_of_a_file_are_read_when_asked_and_not_before(tmp_path: Path) -> None:
    picture(seed=1).save(tmp_path / "a.png")
    found = source("a.png", tmp_path)
    picture(seed=2).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_image(found)), np.asarray(picture(seed=2)))
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match=r"rows.jsonl:3: field 'image': .*a.png: cannot be read"):
        found.read()


def test_kinds_of_pixels_become_rgb() -> None:
    image = picture()
    assert pixels(encoded(image, "TIFF")).tolist() == np.asarray(image).tolist()
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    assert np.array_equal(pixels(encoded(palette)), np.asarray(palette.convert("RGB")))
    cmyk = encoded(image.convert("CMYK"), "TIFF")
    assert np.array_equal(pixels(cmyk), np.asarray(Image.open(BytesIO(cmyk)).convert("RGB")))
    deep = np.array([[0, 255, 256, 40_000, 65_535]], dtype=np.uint16)
    assert pixels(encoded(Image.fromarray(deep)))[0, :, 0].tolist() == [0, 0, 1, 156, 255]
    assert pixels(encoded(image.convert("LA"))).shape == (6, 8, 3)


def test_exif_turns_an_image_upright() -> None:
    image = picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned right by a quarter
    turned = pixels(encoded(image, "PNG", exif=exif))
    assert np.array_equal(turned, np.rot90(np.asarray(image), k=-1))


def test_more_pixels_than_allowed_are_scaled_down() -> None:
    found = media_source(encoded(picture(40, 10)), "image", WHERE, None)
    assert read_image(found, 100).size == (20, 5)
    assert read_image(found, 400).size == (40, 10)


def animated() -> bytes:
    return encoded(picture(seed=1), "GIF", save_all=True, append_images=[picture(seed=2)])


BROKEN = {
    "truncated": (encoded(picture(64, 64), "JPEG")[:600], "damaged image"),
    "no image": (b"hello", "not an image that can be read"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image that can be read"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image that can be read"),
    "bomb": (bomb(), "far too many pixels, and at most 64 million"),
    "too large": (encoded(Image.new("1", (9000, 8000))), "9000 x 8000 pixels, and at most 64 million"),
    "animated": (animated(), "several frames"),
    "floats": (encoded(Image.fromarray(np.ones((2, 2), dtype=np.float32)), "TIFF"), "32 bits"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_refused_in_one_line(name: str) -> None:
    data, words = BROKEN[name]
    with pytest.raises(InputError, match=words) as caught:
        pixels(data)
    assert str(caught.value).startswith(WHERE)
    assert "\n" not in str(caught.value)


def test_recordings_are_averaged_and_resampled(tmp_path: Path) -> None:
    stereo = read_audio(source(recording(tmp_path / "a.wav", 0.2, 8000, channels=2).name, tmp_path, "audio"), 16000)
    assert stereo.dtype == np.float32
    assert stereo.shape == (3200,)
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(3200) / 16000)
    assert np.abs(stereo - wanted)[200:-200].max() < 0.01
    flac = recording(tmp_path / "b.flac").read_bytes()
    assert read_audio(media_source(flac, "audio", WHERE, None), 16000).shape == (1600,)


def test_broken_recordings_are_refused_in_one_line(tmp_path: Path) -> None:
    recording(tmp_path / "none.wav", seconds=0)
    for value, words in ((b"hello", "not a recording"), ("none.wav", "has no samples")):
        with pytest.raises(InputError, match=words):
            read_audio(source(value, tmp_path, "audio"), 16000)


def test_a_processor_that_needs_another_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolVLM's processor writes numbers as words."""
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    model = save_vision_model("idefics3", tmp_path / "smolvlm")
    for name in ("processor_config.json", "tokenizer_config.json"):
        file = tmp_path / "smolvlm" / name
        file.write_text(file.read_text().replace("Idefics3", "SmolVLM"))
    words = r"smolvlm: its processor needs another package \(.*pip install num2words`"
    with pytest.raises(InputError, match=words) as caught:
        load_processor(tmp_path / "smolvlm", type(model))
    assert "\n" not in str(caught.value)
