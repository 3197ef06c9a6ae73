"""An audio source in, samples of one channel at the model's rate out."""

from io import BytesIO
from math import gcd
from typing import TYPE_CHECKING

from onelayer.compiler.errors import InputError
from onelayer.compiler.media.sources import MediaSource

if TYPE_CHECKING:
    import numpy as np

MOST_SAMPLES = 128_000_000  # of all channels: a file of a few kB may claim any length


def read_audio(source: MediaSource, rate_hz: int) -> "np.ndarray":
    """Decode a recording to float32 samples (N,) in -1 to 1: channels averaged, resampled by a polyphase filter.

    Raises `InputError` for files that libsndfile does not read, and for those that are empty or too long.
    """
    try:
        import soundfile  # type: ignore[import-untyped]
    except ImportError:
        raise InputError(f"{source}: audio needs the audio extra; pip install 'onelayer[audio]'") from None
    import numpy as np

    data = source.read()
    try:
        with soundfile.SoundFile(BytesIO(data)) as file:
            if file.frames * file.channels > MOST_SAMPLES:
                raise InputError(f"{source}: {file.frames} samples of {file.channels} channels are too many; cut it")
            samples, given_hz = file.read(dtype="float32", always_2d=True), int(file.samplerate)
    except (soundfile.LibsndfileError, RuntimeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: not a recording that can be read ({error}); save it as WAV or FLAC") from None
    mono: np.ndarray = samples.mean(axis=1)
    if not mono.size:
        raise InputError(f"{source}: has no samples; remove the row, or record it again")
    if not np.isfinite(mono).all():
        raise InputError(f"{source}: has samples that are not finite; record it again")
    if given_hz == rate_hz:
        return mono
    from scipy.signal import resample_poly  # type: ignore[import-untyped]

    shared = gcd(given_hz, rate_hz)
    return np.asarray(resample_poly(mono, rate_hz // shared, given_hz // shared), dtype=np.float32)
