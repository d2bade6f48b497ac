"""URLs of strangers reach the public internet and nothing else."""

from __future__ import annotations

import pytest

from gateway.webhooks.outside import Outside, UnreachableError, is_public
from protocol.wire.errors import BadRequest

PRIVATE = (
    "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
    "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1",
    "::ffff:10.0.0.1", "2002:7f00:1::", "2002:a00:1::", "64:ff9b:1::1",
    "64:ff9b::7f00:1", "192.0.2.1", "198.18.0.1", "2001:db8::1",
)  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111"])
def test_addresses_that_are(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "127.1", "2130706433", "0x7f000001", "[::1]", "[::ffff:127.0.0.1]", "0"]
)
async def test_names_of_this_machine_are_not_asked(host: str) -> None:
    outside = Outside(private=False)
    with pytest.raises(UnreachableError, match=r"not of the public internet|not known"):
        await outside.post(f"https://{host}/", b"", {})
    await outside.close()


@pytest.mark.parametrize(
    "url", ["https://[", "https://[::1", "https://a/\x01", "https://a:x", "https://\u2100.example"]
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(BadRequest, match=r"^url"):
        Outside(private=False).check(url)


def test_http_is_for_private_networks() -> None:
    with pytest.raises(BadRequest, match="must be https"):
        Outside(private=False).check("http://example.com")
    Outside(private=True).check("http://example.com")
