"""Sound as a condition: a waveform's log-mel spectrogram, as tokens or as channels beside x.

Letters in shapes: B samples, N values of the waveform, F = 1 + N // hop frames, M bands.
"""

from __future__ import annotations

import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from k_diffusion.models.conditioners import Conditioner, register_conditioner
from k_diffusion.models.registry import check_types

QUIETEST = 1e-10
"""Power that counts as silence: 100 dB below a full-scale sine."""


def hertz_to_mel(hertz: Tensor) -> Tensor:
    """2595 log10(1 + f / 700) (O'Shaughnessy 1987, Speech Communication: Human and Machine)."""
    return 2595 * torch.log10(1 + hertz / 700)


def mel_to_hertz(mel: Tensor) -> Tensor:
    """The inverse of `hertz_to_mel`."""
    return 700 * (10 ** (mel / 2595) - 1)


def mel_filters(bands: int, window: int, sample_rate: int, low_hz: float, high_hz: float) -> Tensor:
    """Triangles of height 1 whose corners are evenly spaced in mel, float64.

    Band m rises from corner m to m + 1 and falls to m + 2, linearly in Hertz.

    Args:
        bands: M.
        window: values of one Fourier transform.
        sample_rate: values a second.
        low_hz: where the first band begins.
        high_hz: where the last one ends.

    Returns:
        Weight of each frequency k · sample_rate / window in each band, shape (M, window // 2 + 1).

    Source: Davis and Mermelstein 1980, doi:10.1109/TASSP.1980.1163420.
    """
    ends = hertz_to_mel(torch.tensor([low_hz, high_hz], dtype=torch.float64))
    steps = torch.linspace(0, 1, bands + 2, dtype=torch.float64)
    corners = mel_to_hertz(ends[0] + (ends[1] - ends[0]) * steps)[:, None]
    hertz = torch.arange(window // 2 + 1, dtype=torch.float64) * (sample_rate / window)
    rising = (hertz - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - hertz) / (corners[2:] - corners[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """How a waveform is analysed.

    Args:
        sample_rate: values a second.
        window: values of one Fourier transform, under a Hann window.
        hop: values from one frame to the next.
        bands: of the mel scale, M: the width of the tokens, or the channels beside x.
        low_hz: where the lowest band begins.
        high_hz: where the highest one ends; None: half the sample rate.
        reads: see `Conditioner`.
    """

    sample_rate: int = 16_000
    window: int = 1024
    hop: int = 256
    bands: int = 80
    low_hz: float = 0.0
    high_hz: float | None = None
    reads: str = "audio"

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("sample_rate", "window", "hop", "bands"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} = {value} is too small; give at least 1")
        highest = self.sample_rate / 2
        if self.high_hz is None:
            object.__setattr__(self, "high_hz", highest)
        if not 0 <= self.low_hz < self.highest <= highest:
            raise ValueError(
                f"low_hz = {self.low_hz} and high_hz = {self.high_hz} are no range of frequencies; "
                f"give 0 <= low_hz < high_hz <= {highest}, half the sample rate"
            )
        if bool((self.filters().sum(1) == 0).any()):
            raise ValueError(
                f"bands = {self.bands} are too many for a window of {self.window} values: some "
                "hold none of its frequencies; give fewer bands, or a longer window"
            )

    @property
    def highest(self) -> float:
        return self.sample_rate / 2 if self.high_hz is None else self.high_hz

    def filters(self) -> Tensor:
        """See `mel_filters`."""
        return mel_filters(self.bands, self.window, self.sample_rate, self.low_hz, self.highest)


class _Audio(Conditioner):
    """What both share; abstract."""

    Config = AudioConfig
    config: AudioConfig

    def __init__(self, config: Any = None, /, **options: Any) -> None:
        super().__init__(config, **options)
        self.hann: Tensor
        self.filters: Tensor
        window = self.config.window
        self.register_buffer("hann", torch.hann_window(window), persistent=False)
        self.register_buffer("filters", self.config.filters().float(), persistent=False)

    def spectrogram(self, waveforms: Tensor) -> Tensor:
        """Power in each band and frame: about 1 for a full-scale sine, -1 for silence.

        Frame f looks at the values around f · hop; beyond both ends there is silence. In between it
        is linear in decibels: each 0.02 is one of them.

        Args:
            waveforms: values in [-1, 1], shape (B, N).

        Returns:
            Shape (B, F, M), float32.
        """
        config = self.config
        with torch.autocast(waveforms.device.type, enabled=False):
            spectrum = torch.stft(
                waveforms.float(),
                config.window,
                config.hop,
                window=self.hann,
                center=True,
                pad_mode="constant",
                return_complex=True,
            )
            # A sine of amplitude 1 has a peak of half the window's sum.
            power = spectrum.abs().square() * (4 / self.hann.sum() ** 2)
            return 1 + (self.filters @ power).clamp(min=QUIETEST).log10().mT * 0.2

    def read(self, word: str) -> Any:
        """A WAV file of whole numbers; its channels are averaged."""
        return read_wave(word, self.config.sample_rate)

    def _waveforms(self, raw: Any) -> tuple[Tensor, Tensor]:
        """Waveforms as one tensor (B, N), and how long each is, int64 of shape (B,)."""
        if not isinstance(raw, Tensor):
            try:
                rows = [torch.as_tensor(one).flatten() for one in raw]
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"{type(self).__name__} takes waveforms as tensors or lists of numbers, got "
                    f"{type(raw).__name__}: {error}"
                ) from None
            if not rows:
                raise ValueError(f"{type(self).__name__} takes waveforms, got none")
            lengths = torch.tensor([len(row) for row in rows])
            raw = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        else:
            raw = raw.squeeze(1) if raw.ndim == 3 and raw.shape[1] == 1 else raw
            lengths = torch.full((len(raw),), raw.shape[-1])
        if raw.ndim != 2 or raw.shape[1] == 0 or not raw.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} takes waveforms of one channel, floats of shape (B, N), "
                f"got {raw.dtype} of {tuple(raw.shape)}"
            )
        return raw.to(self.device), lengths.to(self.device)


@register_conditioner("audio_tokens")
class AudioTokens(_Audio):
    """A sound as a sequence: one token a frame, for cross-attention."""

    keywords = ("context", "context_mask")

    def forward(self, raw: Any) -> dict[str, Tensor]:
        """{"context": (B, F, M), "context_mask": (B, F)}; raw: waveforms (B, N), or a list of some.

        Of several lengths, the shorter ones' frames behind their ends do not count.
        """
        waveforms, lengths = self._waveforms(raw)
        context = self.spectrogram(waveforms)
        frames = torch.arange(context.shape[1], device=self.device)
        return {
            "context": context,
            "context_mask": frames <= (lengths // self.config.hop)[:, None],
        }

    def null(self, batch: int, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        frames = 1 if like is None else like["context"].shape[1]
        return {
            "context": torch.zeros(batch, frames, self.config.bands, device=self.device),
            "context_mask": torch.zeros(batch, frames, dtype=torch.bool, device=self.device),
        }


@register_conditioner("audio_channels")
class AudioChannels(_Audio):
    """A sound as channels beside a waveform x of its length: each value of x sees its own time.

    Between two frames they are interpolated linearly. (Kong et al. 2021, arXiv:2009.09761, section
    3.2, enlarge the spectrogram for this by learned layers.)
    """

    keywords = ("image",)

    def forward(self, raw: Any) -> dict[str, Tensor]:
        """{"image": (B, M, N)}; raw: waveforms, shape (B, N) or (B, 1, N)."""
        waveforms, _ = self._waveforms(raw)
        frames = self.spectrogram(waveforms).mT
        place = torch.arange(waveforms.shape[1], device=self.device) / self.config.hop
        before = place.floor().long()
        after = (before + 1).clamp(max=frames.shape[2] - 1)
        return {"image": torch.lerp(frames[:, :, before], frames[:, :, after], place - before)}

    def null(self, batch: int, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        if like is None:
            raise ValueError(
                "a null condition of AudioChannels needs the length of x: give `like`, the "
                "condition to compare with"
            )
        return {"image": like["image"].new_zeros(batch, *like["image"].shape[1:])}


def read_wave(path: str, sample_rate: int) -> Tensor:
    """A WAV file of whole numbers, its channels averaged, shape (1, N), in [-1, 1].

    Raises:
        ValueError: no such WAV file, or one of another sample rate.
    """
    try:
        with wave.open(path, "rb") as file:
            rate, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path} is no WAV file of whole numbers ({error})") from None
    if rate != sample_rate:
        raise ValueError(f"{path} has {rate} values a second; resample it to {sample_rate}")
    values = torch.tensor(whole_numbers(data, width), dtype=torch.float64)
    values = values / 2.0 ** (8 * width - 1)
    return values.reshape(-1, channels).mean(1)[None].float()


def whole_numbers(data: bytes, width: int) -> Sequence[int]:
    """Little-endian numbers of so many bytes each; of one byte, they are shifted by 128."""
    if width == 1:
        return [byte - 128 for byte in data]
    ends = range(0, len(data) - width + 1, width)
    return [int.from_bytes(data[i : i + width], "little", signed=True) for i in ends]
