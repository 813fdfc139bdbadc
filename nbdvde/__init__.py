"""A network block device server whose disks are compressed, encrypted and authenticated."""
