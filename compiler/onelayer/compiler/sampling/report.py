"""What a sampling pass made. Torch-free."""

from onelayer.compiler.results import Report, Result


class Picture(Result):
    """One sample picture, with the file that it is in."""

    file: str
    prompt: str


class Samples(Result):
    """The sample pictures of a run; `seed` is that of the noise of each."""

    output: str
    pictures: tuple[Picture, ...]
    seed: int
    report: Report
