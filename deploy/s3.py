"""The S3 server of `docker compose --profile s3 up`: its keys, and a bucket with the example adapters.

    python s3.py keys FOLDER_OF_SERVER FOLDER_OF_CLIENTS    creates a key pair, unless there is one
    python s3.py fill URL BUCKET FOLDER                     copies each folder in FOLDER into the bucket, and ends

Runs in the control image, which has boto3; `fill` finds the keys as every client of S3 does.
"""

import json
import secrets
import sys
import time
from pathlib import Path

import boto3
from botocore.exceptions import BotoCoreError, ClientError

UP_WITHIN_S = 120


def make_keys(server: Path, clients: Path) -> None:
    """Write a key pair in SeaweedFS's format and in the clients' format. An existing pair is kept."""
    written = clients / "credentials"
    if written.exists():
        return
    key, secret = secrets.token_hex(10).upper(), secrets.token_urlsafe(30)
    owner = {"name": "fleet", "credentials": [{"accessKey": key, "secretKey": secret}]}
    identities = {"identities": [{**owner, "actions": ["Admin", "Read", "List", "Write", "Tagging"]}]}
    for file, text in (
        (server / "s3.json", json.dumps(identities)),
        (written, f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"),
    ):
        file.touch(mode=0o600)
        file.write_text(text)


def fill(url: str, bucket: str, folder: Path) -> None:
    """Create the bucket, and upload each adapter's files under its name. Waits for the server. Exits on its error."""
    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
    deadline_s = time.monotonic() + UP_WITHIN_S
    while True:
        try:
            if bucket not in {found["Name"] for found in client.list_buckets()["Buckets"]}:
                client.create_bucket(Bucket=bucket)
            break
        except (BotoCoreError, ClientError) as error:
            if time.monotonic() > deadline_s:
                sys.exit(f"{url}: {error}")
            time.sleep(1)
    for config in sorted(folder.glob("*/adapter_config.json")):
        for file in sorted(config.parent.iterdir()):
            client.upload_file(str(file), bucket, f"{config.parent.name}/{file.name}")
        print(f"s3://{bucket}/{config.parent.name}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["keys", server, clients]:
            make_keys(Path(server), Path(clients))
        case ["fill", url, bucket, folder]:
            fill(url, bucket, Path(folder))
        case _:
            sys.exit(__doc__)
