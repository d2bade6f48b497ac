"""Opens the storage named by a setting."""

from __future__ import annotations

from pathlib import Path

from gateway.files.storage import FolderStorage, Storage
from protocol.runtime.free_space import Reserve
from protocol.wire.errors import BadRequest


def open_storage(place: str, default: Path, s3_endpoint: str = "", keep_free: int = 0) -> Storage:
    """Return the storage of a setting: a folder, `s3://BUCKET/PREFIX`, or "" for the default folder.

    keep_free: free-space reserve, in bytes, of its disk or of the disk that buffers files for S3. Raises BadRequest for
    an invalid setting.
    """
    if not place.startswith("s3://"):
        return FolderStorage(Path(place).expanduser() if place else default, Reserve(keep_free))
    bucket, _, prefix = place.removeprefix("s3://").rstrip("/").partition("/")
    if not bucket:
        raise BadRequest(f"files: {place!r} has no bucket; the form is s3://BUCKET/PREFIX")
    from gateway.files.s3_storage import S3Storage, make_client  # importing boto3 takes a third of a second

    return S3Storage(make_client(s3_endpoint), bucket, f"{prefix}/" if prefix else "", Reserve(keep_free))
