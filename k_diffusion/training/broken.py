"""How much of the data may be broken."""

from __future__ import annotations

from k_diffusion.training.dataset import DataError, Source

_NAMED = 3


class BrokenDataError(DataError):
    """More of the data is broken than the run allows."""

    everywhere = True  # as in ConfigError


def check_bad_share(source: Source, most: float) -> None:
    """Refuse to go on with data of which more than this share turned out broken.

    Raises:
        BrokenDataError: how many are, and the first of them with the reasons.
    """
    bad, found = len(source.bad_files), source.found
    if bad <= most * found:
        return
    named = [f"{file} ({reason})" for file, reason in source.bad_files.items()][:_NAMED]
    more = [f"{bad - _NAMED} more"] if bad > _NAMED else []
    raise BrokenDataError(
        f"{bad} of {found} images are broken, which is more than max_bad_share = {most} allows: "
        f"{', '.join([*named, *more])}; mend them, take them out, or raise max_bad_share"
    )
