"""The search for codes: the best path, paths that make up for their errors, and windows as bits in bytes."""

import itertools

import pytest
import torch

from onelayer.compiler.codes import forms
from onelayer.compiler.codes.codebook import normal_codebook
from onelayer.compiler.codes.forms import CODE_SHAPES, CodeBits, CodeShape
from onelayer.compiler.codes.search import best_windows
from onelayer.compiler.codes.windows import packed_windows, windows

# The squared error of normal values in units of their variance; a shape of as many bits a value can reach 4 ** -bits.
ERRORS = {(2, 7): 0.0150, (2, 6): 0.0253, (2, 5): 0.0446, (2, 4): 0.083, (3, 5): 0.131, (2, 3): 0.157}
ERRORS |= {(3, 4): 0.197, (4, 4): 0.301}


def noise(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7, 8])
def test_windows_are_read_from_bytes_as_from_a_string_of_bits(bits: CodeBits) -> None:
    codes = torch.randint(256, (5, 40), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    count = (8 * 40 - 8) // bits + 1
    strings = ["".join(f"{byte:08b}" for byte in row) for row in codes.tolist()]
    wanted = [[int(string[bits * t : bits * t + 8], 2) for t in range(count)] for string in strings]
    assert windows(codes, bits, count).tolist() == wanted
    assert windows(codes, bits, 11, 13).tolist() == [row[13:24] for row in wanted]
    packed = packed_windows(windows(codes, bits, count), bits)
    assert windows(packed, bits, count).tolist() == wanted


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_without_correlation_the_path_is_the_best_of_all(bits: CodeBits) -> None:
    codebook, values = noise(256, 2, seed=1), noise(3, 6, seed=2)
    found = best_windows(values.clone(), torch.eye(6), codebook, bits)
    codes = range(1 << bits)
    paths = torch.tensor(
        [
            (first, second := (first << bits | a) & 255, (second << bits | b) & 255)
            for first, a, b in itertools.product(range(256), codes, codes)
        ]
    )
    for row, own in zip(values, found, strict=True):
        errors = (codebook[paths].flatten(1) - row).square().sum(dim=1)
        assert own.tolist() == paths[errors.argmin()].tolist()


def test_a_path_that_begins_somewhere_goes_on_from_there() -> None:
    codebook, values = noise(256, 2, seed=1), noise(7, 12, seed=2)
    before = torch.arange(7, dtype=torch.uint8) * 33
    found = best_windows(values, torch.eye(12), codebook, 3, before)
    assert torch.equal(found[:, 0] >> 3, before & 31)


@pytest.mark.parametrize("shape", CODE_SHAPES)
def test_normal_values_lose_as_little_as_is_stated(shape: CodeShape) -> None:
    values = noise(64, 96 * shape.width)
    codebook = normal_codebook(shape)
    found = best_windows(values.clone(), torch.eye(values.shape[1]), codebook, shape.bits)
    lost = float((values - codebook[found.long()].flatten(1)).square().mean())
    assert 4 ** (-shape.bits / shape.width) < lost < ERRORS[shape]


def test_rows_are_searched_some_at_a_time_to_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    values, codebook = noise(40, 96), normal_codebook(CodeShape(2, 4))
    mixing = torch.eye(96) + noise(96, 96, seed=4) / 20
    feedback = torch.linalg.cholesky(torch.linalg.inv(mixing.T @ mixing), upper=True)
    at_once = best_windows(values.clone(), feedback, codebook, 4)
    monkeypatch.setattr(forms, "PATH_VALUES", 7 * forms.LAZY_COLUMNS * 16)
    assert torch.equal(best_windows(values.clone(), feedback, codebook, 4), at_once)


def test_blocks_of_columns_lose_no_more_than_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    values, codebook = noise(64, 128), normal_codebook(CodeShape(2, 4))
    mixing = torch.eye(128) + noise(128, 128, seed=4) / 12
    moments = mixing.T @ mixing
    feedback = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True)
    lost = []
    for columns in (32, 128):
        monkeypatch.setattr("onelayer.compiler.codes.search.LAZY_COLUMNS", columns)
        error = values - codebook[best_windows(values.clone(), feedback, codebook, 4).long()].flatten(1)
        lost.append(float(((error @ moments) * error).sum()))
    assert lost[0] < 1.02 * lost[1]
