"""An image source in, upright RGB pixels out; what cannot be shown to a model is refused in one line."""

import warnings
from io import BytesIO
from typing import TYPE_CHECKING

from onelayer.compiler.errors import InputError
from onelayer.compiler.media.sources import MediaSource

if TYPE_CHECKING:
    from PIL.Image import Image

# Larger images are refused before they are decoded: a file of a few kB may claim any size.
MOST_PIXELS = 64_000_000
# Formats whose readers need no other program; Pillow would run Ghostscript for some of its others.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


def read_image(source: MediaSource, max_pixels: int | None = None) -> "Image":
    """Decode an image to RGB, turned upright by its EXIF orientation, as transformers' `load_image` does.

    An image of more than `max_pixels` is scaled down to that many, its proportions kept. Gray images of 16 bits keep
    the upper eight. Raises `InputError` for several frames, more than 64 million pixels, and damaged or other files.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError:
        raise InputError(f"{source}: images need the images extra; pip install 'onelayer[images]'") from None
    data = source.read()
    try:
        Image.init()
        known = [name for name in FORMATS if name in Image.OPEN]
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = Image.open(BytesIO(data), formats=known)
        _check(file, source)
        upright = ImageOps.exif_transpose(file)
        if upright.mode.startswith("I;16"):
            upright = _upper_bits(upright)
        elif upright.mode == "P":  # transparent palettes go through RGBA
            upright = upright.convert("RGBA")
        return _within(upright.convert("RGB"), max_pixels)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(_too_large(source, "far too many pixels")) from None
    except UnidentifiedImageError:
        kinds = ", ".join(name for name in FORMATS if name != "MPO")
        raise InputError(f"{source}: not an image that can be read; save it as one of {kinds}") from None
    except Exception as error:  # readers raise OSError, SyntaxError, struct.error and others for damaged files
        raise InputError(f"{source}: a damaged image ({error}); restore the file") from None


def _check(image: "Image", source: MediaSource) -> None:
    """Raise `InputError` for an image that must not be decoded: judged by its header."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise InputError(_too_large(source, f"{width} x {height} pixels"))
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a photograph with a preview
        raise InputError(f"{source}: has several frames; save the one to learn from as an image of its own")
    if image.mode in ("F", "I"):
        raise InputError(f"{source}: pixels of 32 bits have no known range; save it with 8 or 16 bits")


def _too_large(source: MediaSource, size: str) -> str:
    return f"{source}: {size}, and at most {MOST_PIXELS // 10**6} million are decoded; scale the image down"


def _upper_bits(image: "Image") -> "Image":
    import numpy as np
    from PIL import Image

    return Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8))


def _within(image: "Image", max_pixels: int | None) -> "Image":
    """Scale an image down to at most `max_pixels`."""
    width, height = image.size
    if max_pixels is None or width * height <= max_pixels:
        return image
    from PIL import Image

    factor = (max_pixels / (width * height)) ** 0.5
    return image.resize((max(1, int(width * factor)), max(1, int(height * factor))), Image.Resampling.BICUBIC)
