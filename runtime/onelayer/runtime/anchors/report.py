"""What anchoring cost; torch-free, since results of training hold it."""

from onelayer.compiler.results import Result


class AnchorReport(Result):
    """Figures of the anchoring of one training run; after a resume, those since the resume.

    `renewals` counts streams of the original. `offset_bytes` is the most that waited at once; of all offsets,
    `spilled_bytes` went to files. `workspace_bytes` is predicted, and is needed while a stream runs, in addition to the
    emulator and the original's largest unit.
    """

    every: int
    bits: int
    renewals: int
    seconds: float
    bytes_read: int
    offset_bytes: int
    spilled_bytes: int
    largest_unit_bytes: int
    workspace_bytes: int
