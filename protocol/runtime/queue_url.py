"""The queue's URL, completed with passwords and certificates from files."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import SplitResult, quote, urlencode, urlsplit, urlunsplit

from protocol.wire.errors import BadRequest


def full_url(
    redis_url: str,
    *,
    password_file: Path | None = None,
    sentinel_password_file: Path | None = None,
    ca_file: Path | None = None,
    cert_file: Path | None = None,
    key_file: Path | None = None,
) -> str:
    """Return the queue's URL for its client; the files are those of the settings `redis_*`.

    Raises BadRequest if the files do not fit the URL or cannot be read.
    """
    url = urlsplit(redis_url)
    if password_file is not None:
        if url.password:
            raise BadRequest("redis_password_file: the queue's URL holds a password already")
        password = _secret_of("redis_password_file", password_file)
        user, _, host = url.netloc.rpartition("@")
        url = url._replace(netloc=f"{user}:{quote(password, safe='')}@{host}")
    options = {"ssl_ca_certs": ca_file, "ssl_certfile": cert_file, "ssl_keyfile": key_file}
    given = {name: str(path) for name, path in options.items() if path is not None}
    if given and url.scheme not in ("rediss", "rediss-sentinel"):
        raise BadRequest("redis_ca_file, redis_cert_file and redis_key_file are for a queue at rediss://")
    if (cert_file is None) != (key_file is None):
        raise BadRequest("redis_cert_file and redis_key_file must be set together")
    url = _with(url, given)
    if sentinel_password_file is not None:
        if not url.scheme.endswith("-sentinel"):
            raise BadRequest("redis_sentinel_password_file is for a queue at redis-sentinel:// or rediss-sentinel://")
        url = _with(url, {"sentinel_password": _secret_of("redis_sentinel_password_file", sentinel_password_file)})
    # `urlunsplit` would write unix:///path as unix:/path.
    return urlunsplit(url) if url.netloc else redis_url


def _with(url: SplitResult, fields: dict[str, str]) -> SplitResult:
    return url._replace(query="&".join(part for part in (url.query, urlencode(fields)) if part))


def _secret_of(setting: str, file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{setting}: cannot read {file}: {error}") from error
