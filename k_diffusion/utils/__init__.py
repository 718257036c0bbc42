"""Utilities: noise levels and schedules, augmentation, images, small mathematics."""
