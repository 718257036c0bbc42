"""A file is written whole, or stays what it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from k_diffusion.utils.files import write_text


def test_text_is_there_in_full_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_text(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    real = Path.write_text

    def full(self: Path, text: str, **options: str) -> int:
        real(self, text[:3], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "another\n")
    assert path.read_bytes() == "größer\n".encode()
    assert list(tmp_path.iterdir()) == [path]
