"""Foreign models as Denoisers, and plans as foreign schedulers: not there yet."""
