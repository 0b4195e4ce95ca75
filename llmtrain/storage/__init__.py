"""Folders on any store that fsspec reads and writes: S3 and its kin, other clouds, SFTP, a mounted disk."""
