"""A form with one file (multipart/form-data, RFC 7578), parsed as a stream.

The file's bytes are passed on as they arrive; the other fields are few and short.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest, TooLarge

MAX_FIELDS = 16
"""Maximum parts of a form."""

MAX_FIELD_BYTES = 4096
"""Maximum bytes of a field's name and value, and of a part's headers."""

MAX_PARAMETERS = 64
"""Semicolons of a header. Its parser took 29 ms of the event loop for the 60,000 that a head has room for."""

MAX_FILENAME_CHARACTERS = 255


class UploadedForm:
    """A form being received. `chunks` yields its file; afterwards `fields` and `filename` are complete."""

    def __init__(self, content_type: str, max_bytes: int) -> None:
        """max_bytes: maximum bytes of the file. Raises BadRequest for a body that is not a form."""
        kind, options = _options_of(content_type.encode())
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not 0 < len(boundary) <= 200:
            raise BadRequest(f"a file is uploaded as multipart/form-data with a boundary, not as {brief(content_type)}")
        self.fields: dict[str, str] = {}
        self.filename = ""
        self.has_file = False
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._ready: list[bytes] = []  # file bytes not passed on yet
        self._num_parts = 0
        self._is_file = False
        self._header = b""  # name of the current part's header
        self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._field = ""
        self._has_ended = False
        self._check: Callable[[Mapping[str, str]], None] = lambda fields: None
        callbacks: Any = {
            "on_part_begin": self._begin,
            "on_part_data": self._take,
            "on_part_end": self._end,
            "on_header_field": self._take_header,
            "on_header_value": self._take_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_end": self._finish,
        }
        self._parser = MultipartParser(boundary, callbacks)

    async def chunks(
        self, body: AsyncIterator[bytes], check: Callable[[Mapping[str, str]], None]
    ) -> AsyncIterator[bytes]:
        """Yield the file's bytes. Raises BadRequest for an invalid form, TooLarge, and as `check`.

        check: called with the fields that precede the file, before its first byte is yielded.
        """
        self._check = check
        async for part in body:
            try:
                self._parser.write(part)
            except MultipartParseError as error:
                raise BadRequest(f"the form cannot be read: {error}") from error
            for chunk in self._ready:
                yield chunk
            self._ready.clear()
        if not self._has_ended:
            raise BadRequest("the form ends within a part")
        if not self.has_file:
            raise BadRequest("the form has no file: send it as the part `file`", param="file")

    # ------------------------------------------------------------ callbacks of the parser

    def _begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_FIELDS:
            raise BadRequest(f"the form has more than {MAX_FIELDS} parts")
        self._headers, self._header, self._value, self._is_file = {}, b"", b"", False

    def _take_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]
        _check(self._header)

    def _take_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        _check(self._value)

    def _end_header(self) -> None:
        if len(self._headers) >= MAX_FIELDS:
            raise BadRequest(f"a part of the form has more than {MAX_FIELDS} headers")
        self._headers[self._header.lower()] = self._value
        self._header, self._value = b"", b""

    def _end_headers(self) -> None:
        _, options = _options_of(self._headers.get(b"content-disposition", b""))
        self._field = options.get(b"name", b"").decode(errors="replace")
        if b"filename" not in options:
            if self._field in self.fields:
                raise BadRequest(f"the form has the field {brief(self._field)} twice", param=self._field)
            self.fields[self._field] = ""
            return
        if self._field != "file" or self.has_file:
            raise BadRequest(f"one file is uploaded at a time, as `file`: not {brief(self._field)}", param=self._field)
        self._check(self.fields)
        self._is_file = self.has_file = True
        name = options[b"filename"].decode(errors="replace").replace("\\", "/").rpartition("/")[2]
        self.filename = "".join(c for c in name if c.isprintable())[:MAX_FILENAME_CHARACTERS] or "file"

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self.num_bytes += end - start
            if self.num_bytes > self._max_bytes:
                raise TooLarge(f"the file has more than {self._max_bytes} bytes", param="file")
            self._ready.append(data[start:end])
            return
        self._value += data[start:end]
        _check(self._value)

    def _end(self) -> None:
        if not self._is_file:
            try:
                self.fields[self._field] = self._value.decode()
            except UnicodeDecodeError as error:
                raise BadRequest(f"the field {brief(self._field)} is not UTF-8", param=self._field) from error

    def _finish(self) -> None:
        self._has_ended = True


def _options_of(header: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    if (num := header.count(b";")) > MAX_PARAMETERS:
        raise BadRequest(f"a header of the form has {num} semicolons; the limit is {MAX_PARAMETERS}")
    return parse_options_header(header)


def _check(value: bytes) -> None:
    if len(value) > MAX_FIELD_BYTES:
        raise BadRequest(f"a field or header of the form has more than {MAX_FIELD_BYTES} bytes")
