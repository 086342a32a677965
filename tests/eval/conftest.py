"""Small disks."""

from small_disks import small_disk, unwritable

__all__ = ["small_disk", "unwritable"]
