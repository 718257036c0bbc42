"""The log-mel spectrogram against its definition, and the two conditions made of it."""

from __future__ import annotations

import math
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from k_diffusion.models import AudioChannels, AudioTokens
from k_diffusion.models.audio_conditioners import hertz_to_mel, mel_filters, mel_to_hertz, read_wave

OPTIONS = {"sample_rate": 8000, "window": 128, "hop": 32, "bands": 12}


def by_definition(waveform: np.ndarray, low: float = 0.0, high: float = 4000.0) -> np.ndarray:
    """The spectrogram in numpy, frame by frame and band by band; shape (frames, bands)."""
    rate, window, hop, bands = OPTIONS.values()
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    padded = np.concatenate([np.zeros(window // 2), waveform, np.zeros(window // 2)])
    corners = 700 * (
        10
        ** (
            np.linspace(2595 * np.log10(1 + low / 700), 2595 * np.log10(1 + high / 700), bands + 2)
            / 2595
        )
        - 1
    )
    hertz = np.arange(window // 2 + 1) * rate / window
    rows = []
    for start in range(0, len(waveform) + 1, hop):
        turns = np.exp(-2j * np.pi * np.outer(hertz / rate, np.arange(window)))
        power = np.abs(turns @ (hann * padded[start : start + window])) ** 2
        power = power / (hann.sum() / 2) ** 2
        row = []
        for left, middle, right in zip(corners, corners[1:], corners[2:], strict=False):
            weight = np.interp(hertz, [left, middle, right], [0, 1, 0])
            row.append(1 + 0.2 * np.log10(max((weight * power).sum(), 1e-10)))
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("length", [33, 200, 256])
@pytest.mark.parametrize("limits", [{}, {"low_hz": 100.0, "high_hz": 3000.0}])
def test_spectrogram_by_definition(length: int, limits: dict[str, float]) -> None:
    waveform = np.random.default_rng(0).uniform(-1, 1, length)
    conditioner = AudioTokens(**OPTIONS, **limits)
    made = conditioner.spectrogram(torch.from_numpy(waveform)[None])[0]
    wanted = by_definition(waveform, limits.get("low_hz", 0.0), limits.get("high_hz", 4000.0))
    assert made.shape == (1 + length // 32, 12)
    assert np.abs(made.numpy() - wanted).max() < 1e-5


def test_mel_scale() -> None:
    hertz = torch.tensor([0.0, 700.0, 8000.0], dtype=torch.float64)
    mel = hertz_to_mel(hertz)
    assert mel.tolist()[:2] == pytest.approx([0, 2595 * math.log10(2)], abs=1e-12)
    assert (mel_to_hertz(mel) - hertz).abs().max() < 1e-9
    weights = mel_filters(10, 512, 16000, 0.0, 8000.0)
    assert weights.shape == (10, 257)
    # Inside, neighbouring bands share what lies between their middles: together they weigh 1.
    middles = mel_to_hertz(torch.linspace(0, float(mel[2]), 12, dtype=torch.float64))[1:-1]
    bins = torch.arange(257) * 31.25
    inside = (bins >= middles[0]) & (bins <= middles[-1])
    assert (weights.sum(0)[inside] - 1).abs().max() < 1e-9


def test_a_full_scale_sine_is_one_and_silence_minus_one() -> None:
    conditioner = AudioTokens(**OPTIONS)
    middle = float(mel_to_hertz(hertz_to_mel(torch.tensor(4000.0, dtype=torch.float64)) * 6 / 13))
    time = torch.arange(8000) / 8000
    heard = conditioner.spectrogram(torch.sin(2 * math.pi * middle * time)[None])[0, 100]
    assert int(heard.argmax()) == 5
    assert abs(float(heard[5]) - 1) < 0.04  # two decibels: its neighbours under the window count
    quiet = conditioner.spectrogram(0.01 * torch.sin(2 * math.pi * middle * time)[None])[0, 100]
    assert abs(float(heard[5] - quiet[5]) - 40 * 0.02) < 1e-4  # 40 dB
    assert torch.equal(conditioner.spectrogram(torch.zeros(1, 64)), torch.full((1, 3, 12), -1.0))


def test_it_is_not_rounded_by_autocast() -> None:
    conditioner = AudioTokens(**OPTIONS)
    waveform = torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
    plain = conditioner.spectrogram(waveform)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conditioner.spectrogram(waveform), plain)


def test_tokens_of_several_lengths_count_to_their_ends() -> None:
    conditioner = AudioTokens(**OPTIONS)
    generator = torch.Generator().manual_seed(0)
    long, short = (torch.randn(n, generator=generator) for n in (320, 200))
    made = conditioner([long, short])
    assert made["context"].shape == (2, 11, 12)
    assert made["context_mask"].sum(1).tolist() == [11, 7]
    alone = conditioner(short[None])
    assert alone["context_mask"].all()
    assert (made["context"][1, :7] - alone["context"][0]).abs().max() < 1e-5
    null = conditioner.null(3)
    assert null["context"].shape == (3, 1, 12)
    assert not null["context_mask"].any()
    assert conditioner.null(2, made)["context_mask"].shape == (2, 11)


def test_channels_stand_where_they_sound() -> None:
    conditioner = AudioChannels(**OPTIONS)
    waveform = torch.randn(2, 1, 100, generator=torch.Generator().manual_seed(0))
    made = conditioner(waveform)["image"]
    frames = conditioner.spectrogram(waveform[:, 0]).mT
    assert made.shape == (2, 12, 100)
    assert torch.equal(made[:, :, ::32], frames)
    between = 0.75 * frames[:, :, 1] + 0.25 * frames[:, :, 2]
    assert (made[:, :, 40] - between).abs().max() < 1e-6
    assert torch.equal(made[:, :, 99], made[:, :, 96])  # there is no frame behind
    assert torch.equal(conditioner.null(3, {"image": made})["image"], torch.zeros(3, 12, 100))
    with pytest.raises(ValueError, match="needs the length of x: give `like`"):
        conditioner.null(3)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_a_wave_file(tmp_path: Path, width: int) -> None:
    path = str(tmp_path / "sound.wav")
    scale = 2 ** (8 * width - 1)
    stereo = [[0, 0], [scale // 2, 0], [-scale, -scale], [scale - 1, scale - 1]]
    shift = 128 if width == 1 else 0
    with wave.open(path, "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(width)
        file.setframerate(8000)
        values = [v + shift for frame in stereo for v in frame]
        file.writeframes(b"".join(v.to_bytes(width, "little", signed=width > 1) for v in values))
    made = read_wave(path, 8000)
    assert made.shape == (1, 4)
    assert (made - torch.tensor([[0, 0.25, -1, 1 - 1 / scale]])).abs().max() < 1e-7
    assert torch.equal(AudioTokens(**OPTIONS).read(path), made)
    with pytest.raises(ValueError, match="has 8000 values a second; resample it to 16000"):
        read_wave(path, 16000)
    (tmp_path / "no.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"no.wav is no WAV file"):
        read_wave(str(tmp_path / "no.wav"), 8000)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bands": 0}, "bands = 0 is too small"),
        ({"bands": 60}, "bands = 60 are too many for a window of 128 values"),
        ({"low_hz": 4000.0}, "low_hz = 4000.0 and high_hz = 4000.0 are no range"),
        ({"high_hz": 5000.0}, "give 0 <= low_hz < high_hz <= 4000.0, half the sample rate"),
        ({"hop": "32"}, "hop = '32' does not fit; give a whole number"),
    ],
)
def test_options_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AudioTokens(**{**OPTIONS, **options})


@pytest.mark.parametrize("raw", [torch.zeros(2, 2, 50), torch.zeros(2, 50).long()])
def test_waveforms_refused(raw: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="takes waveforms of one channel, floats of shape"):
        AudioTokens(**OPTIONS)(raw)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (
            ["a.wav", "b.wav"],
            "AudioTokens takes waveforms as tensors or lists of numbers, got list",
        ),
        (3.5, "AudioTokens takes waveforms as tensors or lists of numbers, got float"),
        ([], "AudioTokens takes waveforms, got none"),
    ],
)
def test_what_is_no_waveform(raw: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        AudioTokens()(raw)
